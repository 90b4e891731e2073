"""The patches of an image, and the labels of each that train the vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.demo.scenes.world import DIGITS, IMAGE_SIZE, MAX_OBJECTS, SHAPES, Scenes

PATCH_SIZE = 8
GRID = IMAGE_SIZE // PATCH_SIZE
NO_KIND = len(SHAPES) + len(DIGITS)
"""Label of a patch without an object; shapes come first, then digits."""

_Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class PatchLabels:
    """What the object covering most of each patch is; `[B, P]`, P patches in reading order."""

    kind: NDArray[np.int64]
    """Shapes, then digits, then `NO_KIND`."""
    colour: NDArray[np.int64]
    """-100 (ignored by cross entropy) where there is no object, as for `large`."""
    large: NDArray[np.int64]
    centre: NDArray[np.float32]
    """`[B, P, 2]`: the object's centre, or the patch's own where there is none; 0..1 of the image."""


def patch_labels(scenes: Scenes) -> PatchLabels:
    """Labels of every patch: it belongs to the object whose box covers most of it, from an eighth up."""
    edges = np.arange(GRID) * PATCH_SIZE
    low = scenes.centre_BK2 - scenes.half_BK[..., None]
    high = scenes.centre_BK2 + scenes.half_BK[..., None]

    def overlap(axis: int) -> _Floats:
        top = np.minimum(high[:, :, axis, None], edges + PATCH_SIZE)
        found: _Floats = np.clip(top - np.maximum(low[:, :, axis, None], edges), 0, None)
        return found

    area = overlap(1)[:, :, :, None] * overlap(0)[:, :, None, :]  # [B, K, rows, columns]
    area[np.arange(MAX_OBJECTS) >= scenes.count_B[:, None]] = 0.0
    area = area.reshape(len(scenes), MAX_OBJECTS, GRID * GRID)
    owner = area.argmax(axis=1)
    empty = area.max(axis=1) < PATCH_SIZE * PATCH_SIZE / 8

    def of_owner(values_BK: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.take_along_axis(values_BK, owner, axis=1)

    offset = 0 if scenes.variant == "shapes" else len(SHAPES)
    own = (np.stack(np.meshgrid(edges, edges), axis=-1).reshape(-1, 2) + PATCH_SIZE / 2) / IMAGE_SIZE
    centre = np.take_along_axis(scenes.centre_BK2, owner[..., None], axis=1) / IMAGE_SIZE
    return PatchLabels(
        kind=np.where(empty, NO_KIND, of_owner(scenes.kind_BK) + offset),
        colour=np.where(empty, -100, of_owner(scenes.colour_BK)),
        large=np.where(empty, -100, of_owner(scenes.large_BK)),
        centre=np.where(empty[..., None], own, centre),
    )
