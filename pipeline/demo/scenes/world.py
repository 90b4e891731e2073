"""What a scene is: objects of a kind, colour, size and place, and which relations hold among them.

Everything else in this example (drawing, captions, questions, labels) is a function of `Scenes`.
Letters in shapes: B scenes, K = 3 object slots; positions end in (x, y), in pixels, y grows downwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Variant = Literal["shapes", "digits"]
Split = Literal["train", "heldout"]

IMAGE_SIZE = 48
MAX_OBJECTS = 3
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan", "white")
SIZES = ("small", "large")
RELATIONS = ("left", "right", "above", "below")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}

# Half of the side of an object's box, in pixels: [small, large] x [lowest, highest].
_HALF_SIZE = np.array([[5.0, 6.0], [8.0, 9.0]])
_MARGIN = 1.0
# A relation is spoken of only when nobody would dispute it: far along one axis, and little along the other.
CLEAR_DISTANCE = 9.0
CLEAR_RATIO = 1.5


@dataclass(frozen=True)
class Thing:
    """One object of a scene, in words and pixels."""

    noun: str
    colour: str
    size: str
    x: float
    y: float


@dataclass(frozen=True)
class Scenes:
    """B scenes as arrays; slots at or past `count_B` are empty and hold arbitrary values."""

    variant: Variant
    count_B: NDArray[np.int64]
    kind_BK: NDArray[np.int64]
    colour_BK: NDArray[np.int64]
    large_BK: NDArray[np.int64]
    half_BK: NDArray[np.float64]
    centre_BK2: NDArray[np.float64]
    drawing_BK: NDArray[np.int64]
    """Which of scikit-learn's digit images is shown (-1 in the shapes variant)."""

    def __len__(self) -> int:
        return len(self.count_B)

    def things(self, index: int) -> list[Thing]:
        """The objects of scene `index`, in slot order."""
        nouns = NOUNS[self.variant]
        return [
            Thing(
                noun=nouns[self.kind_BK[index, k]],
                colour=COLOURS[self.colour_BK[index, k]],
                size=SIZES[self.large_BK[index, k]],
                x=float(self.centre_BK2[index, k, 0]),
                y=float(self.centre_BK2[index, k, 1]),
            )
            for k in range(self.count_B[index])
        ]

    def boxes(self, index: int) -> list[list[float]]:
        """The boxes of the objects of scene `index`: left, top, right, bottom as parts of the image."""
        count = self.count_B[index]
        centre_K2, half_K1 = self.centre_BK2[index, :count], self.half_BK[index, :count, None]
        corners_K4 = np.concatenate([centre_K2 - half_K1, centre_K2 + half_K1], axis=1) / IMAGE_SIZE
        boxes: list[list[float]] = corners_K4.round(5).tolist()
        return boxes


NOUNS: dict[Variant, tuple[str, ...]] = {"shapes": SHAPES, "digits": DIGITS}


@lru_cache(maxsize=1)
def digit_drawings() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Scikit-learn's 1,797 handwritten digits: `[1797, 8, 8]` ink in 0..1, and their classes."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images / 16.0, bunch.target.astype(np.int64)


@lru_cache(maxsize=4)
def _drawings_of_class(split: Split) -> tuple[NDArray[np.int64], ...]:
    # Every fifth drawing is held out, so that a held-out scene never shows a digit seen in training.
    _, classes = digit_drawings()
    index = np.arange(len(classes))
    mine = (index % 5 == 4) == (split == "heldout")
    return tuple(index[mine & (classes == c)] for c in range(10))


def clear_relation(a: Thing, b: Thing) -> str | None:
    """The relation "a is ... of b" when it is beyond dispute, else None."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) >= CLEAR_DISTANCE and abs(dx) >= CLEAR_RATIO * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) >= CLEAR_DISTANCE and abs(dy) >= CLEAR_RATIO * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def loosely_holds(a: Thing, relation: str, b: Thing) -> bool:
    """Whether "a `relation` b" could be called true under the most generous reading: by a single pixel."""
    dx, dy = a.x - b.x, a.y - b.y
    return {"left": dx < 1, "right": dx > -1, "above": dy < 1, "below": dy > -1}[relation]


def generator(*address: int) -> np.random.Generator:
    """The random generator of an address such as (seed, split, chunk); equal addresses, equal numbers."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(address)))


def sample_scenes(rng: np.random.Generator, num: int, variant: Variant, split: Split) -> Scenes:
    """Draw `num` scenes of two or three objects that do not touch; no two are of one kind and colour.

    With two objects their relation is always clear; with three, that of at least one pair is.
    """
    nouns = NOUNS[variant]
    B, K = num, MAX_OBJECTS
    count_B = rng.integers(2, K + 1, B)
    kind_BK = rng.integers(0, len(nouns), (B, K))
    colour_BK = rng.integers(0, len(COLOURS), (B, K))
    large_BK = rng.integers(0, 2, (B, K))
    while (twins_B := _has_twins(kind_BK * len(COLOURS) + colour_BK)).any():
        kind_BK[twins_B] = rng.integers(0, len(nouns), (int(twins_B.sum()), K))
    half_BK = rng.uniform(_HALF_SIZE[large_BK, 0], _HALF_SIZE[large_BK, 1])
    centre_BK2 = np.zeros((B, K, 2))
    todo = np.arange(B)
    while len(todo):
        half = half_BK[todo]
        room = IMAGE_SIZE - 2 * (half[..., None] + _MARGIN)
        centre_BK2[todo] = _MARGIN + half[..., None] + room * rng.uniform(size=(len(todo), K, 2))
        todo = todo[~_is_legible(centre_BK2[todo], half, count_B[todo])]
    drawing_BK = np.full((B, K), -1, dtype=np.int64)
    if variant == "digits":
        pools = _drawings_of_class(split)
        pick_BK = rng.uniform(size=(B, K))
        for c, pool in enumerate(pools):
            here = kind_BK == c
            drawing_BK[here] = pool[(pick_BK[here] * len(pool)).astype(np.int64)]
    return Scenes(variant, count_B, kind_BK, colour_BK, large_BK, half_BK, centre_BK2, drawing_BK)


def _has_twins(code_BK: NDArray[np.int64]) -> NDArray[np.bool_]:
    ordered = np.sort(code_BK, axis=1)
    twins: NDArray[np.bool_] = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    return twins


def _is_legible(
    centre_BK2: NDArray[np.float64], half_BK: NDArray[np.float64], count_B: NDArray[np.int64]
) -> NDArray[np.bool_]:
    apart_B = np.ones(len(count_B), dtype=bool)
    clear_B = np.zeros(len(count_B), dtype=bool)
    for i in range(MAX_OBJECTS):
        for j in range(i + 1, MAX_OBJECTS):
            both_B = count_B > j
            distance_B2 = np.abs(centre_BK2[:, i] - centre_BK2[:, j])
            far_B, near_B = distance_B2.max(axis=1), distance_B2.min(axis=1)
            apart_B &= ~both_B | (far_B >= half_BK[:, i] + half_BK[:, j] + _MARGIN)
            clear_B |= both_B & (far_B >= CLEAR_DISTANCE) & (far_B >= CLEAR_RATIO * near_B)
    return apart_B & clear_B
