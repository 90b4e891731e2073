"""Turns scenes into pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.demo.scenes.world import IMAGE_SIZE, MAX_OBJECTS, SHAPES, Scenes, digit_drawings

_RGB = np.array(
    [
        [215, 40, 40],  # red
        [45, 175, 60],  # green
        [55, 80, 225],  # blue
        [230, 215, 55],  # yellow
        [150, 50, 175],  # purple
        [55, 205, 215],  # cyan
        [240, 240, 240],  # white
    ],
    dtype=np.float32,
)
_Floats = NDArray[np.floating[Any]]

_LINE = 0.34  # stroke width of rings and crosses, as a share of the half size


def _ink_of_shape(kind: int, u: _Floats, v: _Floats) -> Any:
    """Signed depth inside the shape at (u, v) in -1..1 of its box; positive is inside."""
    match SHAPES[kind]:
        case "circle":
            return 1.0 - np.hypot(u, v)
        case "square":
            return 0.88 - np.maximum(np.abs(u), np.abs(v))
        case "triangle":
            return np.minimum(0.9 - v, (0.95 + v) * 0.5 - np.abs(u) * 0.95)
        case "diamond":
            return (1.05 - np.abs(u) - np.abs(v)) * 0.7
        case "cross":
            return np.minimum(_LINE - np.minimum(np.abs(u), np.abs(v)), 1.0 - np.maximum(np.abs(u), np.abs(v)))
        case _:  # ring
            return 0.22 - np.abs(np.hypot(u, v) - 0.76)


def _ink(scenes: Scenes) -> NDArray[np.float32]:
    """How much each object covers each pixel: `[B, K, H, W]` in 0..1."""
    pixels = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5
    half = scenes.half_BK[:, :, None, None].astype(np.float32)
    centre_BK2 = scenes.centre_BK2.astype(np.float32)
    shape = (*half.shape[:2], IMAGE_SIZE, IMAGE_SIZE)
    u = np.broadcast_to((pixels - centre_BK2[:, :, 0, None])[:, :, None, :] / half, shape)
    v = np.broadcast_to((pixels - centre_BK2[:, :, 1, None])[:, :, :, None] / half, shape)
    if scenes.variant == "shapes":
        ink = np.zeros(shape, dtype=np.float32)
        for kind in range(len(SHAPES)):
            here = scenes.kind_BK == kind
            depth = _ink_of_shape(kind, u[here], v[here]) * half[here]
            ink[here] = np.clip(depth + 0.5, 0.0, 1.0)  # one pixel of soft edge
    else:
        ink = _digit_ink(scenes, u, v)
    empty_BK = np.arange(MAX_OBJECTS) >= scenes.count_B[:, None]
    ink[empty_BK] = 0.0
    return ink


def _digit_ink(scenes: Scenes, u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.float32]:
    """Bilinear samples of the 8x8 drawings, stretched over the object's box."""
    ink_DHW = np.pad(digit_drawings()[0].astype(np.float32), ((0, 0), (1, 2), (1, 2)))
    ink = np.zeros(u.shape, dtype=np.float32)
    inside = (np.abs(u) <= 1.25) & (np.abs(v) <= 1.25)  # outside of it the padded drawing is empty
    drawing = np.broadcast_to(np.maximum(scenes.drawing_BK, 0)[:, :, None, None], u.shape)[inside]
    row = np.clip((v[inside] + 1) * 4 + 0.5, 0.0, 9.0)
    column = np.clip((u[inside] + 1) * 4 + 0.5, 0.0, 9.0)
    r, c = row.astype(np.int64), column.astype(np.int64)
    fr, fc = row - r, column - c
    top = ink_DHW[drawing, r, c] * (1 - fc) + ink_DHW[drawing, r, c + 1] * fc
    bottom = ink_DHW[drawing, r + 1, c] * (1 - fc) + ink_DHW[drawing, r + 1, c + 1] * fc
    ink[inside] = np.clip(1.4 * (top * (1 - fr) + bottom * fr), 0.0, 1.0)
    return ink


def draw(scenes: Scenes, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Paint the scenes on dark noisy grounds: `[B, 48, 48, 3]` RGB. `rng` sets ground, tint and noise."""
    B = len(scenes)
    ground = rng.uniform(15, 75, (B, 1, 1, 1)) + rng.uniform(-8, 8, (B, 1, 1, 3))
    noise = 4.0 * rng.standard_normal((B, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    image = np.broadcast_to(ground.astype(np.float32), noise.shape).copy()
    tint_BK3 = _RGB[scenes.colour_BK] + rng.uniform(-14, 14, (B, MAX_OBJECTS, 3)).astype(np.float32)
    ink = _ink(scenes)
    for k in range(MAX_OBJECTS):
        cover = ink[:, k, :, :, None]
        image += (tint_BK3[:, k, None, None, :] - image) * cover
    image += noise
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
