"""Held-out images, each with a caption that is true of it and one that is false."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.demo.scenes.draw import draw
from pipeline.demo.scenes.language import PAIR_KINDS, PairKind, hard_negative
from pipeline.demo.scenes.world import Variant, generator, sample_scenes

_PAIR_STREAM = 2  # of (seed, stream, ...): 1 is training, 2 is held-out pairs
TRAIN_STREAM = 1


@dataclass(frozen=True)
class CaptionPair:
    """A held-out image, a caption that is true of it and one that is false."""

    pixels: NDArray[np.uint8]
    caption: str
    negative: str


def sample_pairs(num: int, seed: int, variant: Variant) -> dict[PairKind, list[CaptionPair]]:
    """`num` pairs of each kind from the held-out stream of `seed`, of digit drawings training never sees."""
    found: dict[PairKind, list[CaptionPair]] = {}
    for number, kind in enumerate(PAIR_KINDS):
        rng = generator(seed, _PAIR_STREAM, variant == "digits", number)
        pairs: list[CaptionPair] = []
        while len(pairs) < num:
            scenes = sample_scenes(rng, 64, variant, "heldout")
            pixels = draw(scenes, rng)
            for index in range(len(scenes)):
                pair = hard_negative(rng, scenes.things(index), kind, variant)
                if pair:
                    pairs.append(CaptionPair(pixels[index], str(pair[0]), str(pair[1])))
        found[kind] = pairs[:num]
    return found
