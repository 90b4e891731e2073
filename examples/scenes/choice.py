"""Questions that let a model choose between two captions by a letter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.demo.scenes.language import PAIR_KINDS, Exchange, hard_negative, pick

if TYPE_CHECKING:
    import numpy as np

    from pipeline.demo.scenes.world import Thing, Variant


def ask_choice(rng: np.random.Generator, things: list[Thing], variant: Variant) -> Exchange | None:
    """Which of two captions fits, the wrong one being a hard negative of a random kind."""
    pair = hard_negative(rng, things, pick(rng, PAIR_KINDS), variant, tries=3)
    if pair is None:
        return None
    true, false = map(str, pair)
    first, second, answer = (true, false, "A") if rng.random() < 0.5 else (false, true, "B")
    return Exchange(f"Which caption fits? A: {first} B: {second} Answer with A or B.", answer)
