"""What can be said about a scene: captions, their hard negatives, questions and answers.

Every sentence is true (or, for negatives, false) beyond dispute: relations are spoken only when clear, and
denied only when not even a generous reader would grant them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

from pipeline.demo.scenes.world import (
    COLOURS,
    DIGITS,
    IMAGE_SIZE,
    NOUNS,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    SIZES,
    Thing,
    Variant,
    clear_relation,
    loosely_holds,
)

PairKind = Literal["swap_obj", "swap_att", "replace_obj", "replace_att", "replace_rel"]
PAIR_KINDS: tuple[PairKind, ...] = ("swap_obj", "swap_att", "replace_obj", "replace_att", "replace_rel")
DESCRIBE = "Describe the image."

_SAID = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
_COUNTS = ("zero", "one", "two", "three")
_BANDS = (("left", "center", "right"), ("top", "middle", "bottom"))


@dataclass(frozen=True)
class Phrase:
    """A noun phrase; `size` is None where it goes unsaid."""

    colour: str
    noun: str
    size: str | None = None

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.noun}" if self.size else f"{self.colour} {self.noun}"

    def fits(self, thing: Thing) -> bool:
        """Whether the phrase is true of an object."""
        return (
            self.colour == thing.colour and self.noun == thing.noun and (self.size is None or self.size == thing.size)
        )


@dataclass(frozen=True)
class Caption:
    """The sentence `a SUBJECT RELATION a OTHER`."""

    subject: Phrase
    relation: str
    other: Phrase

    def __str__(self) -> str:
        return f"a {self.subject} {_SAID[self.relation]} a {self.other}"

    def could_be_true(self, things: list[Thing]) -> bool:
        """Whether a generous reader could call the caption true of the scene."""
        return any(
            a is not b and self.subject.fits(a) and self.other.fits(b) and loosely_holds(a, self.relation, b)
            for a in things
            for b in things
        )


@dataclass(frozen=True)
class Exchange:
    """One question and its answer. `about_image` is False for questions that need no image."""

    question: str
    answer: str
    about_image: bool = True


def clear_pairs(things: list[Thing]) -> list[tuple[Thing, str, Thing]]:
    """All ordered pairs of objects with a clear relation between them."""
    return [
        (a, relation, b)
        for a in things
        for b in things
        if a is not b and (relation := clear_relation(a, b)) is not None
    ]


_Option = TypeVar("_Option")


def pick(rng: np.random.Generator, options: Sequence[_Option]) -> _Option:
    """One of the options."""
    return options[int(rng.random() * len(options))]


def _other(rng: np.random.Generator, options: tuple[str, ...], *not_these: str) -> str:
    return pick(rng, [option for option in options if option not in not_these])


def phrase(rng: np.random.Generator, thing: Thing, size_share: float = 0.3) -> Phrase:
    """The object in words, its size said in `size_share` of the cases."""
    return Phrase(thing.colour, thing.noun, thing.size if rng.random() < size_share else None)


def true_caption(rng: np.random.Generator, things: list[Thing]) -> Caption:
    """A random caption that clearly holds of the scene."""
    a, relation, b = pick(rng, clear_pairs(things))
    return Caption(phrase(rng, a), relation, phrase(rng, b))


def hard_negative(
    rng: np.random.Generator, things: list[Thing], kind: PairKind, variant: Variant, tries: int = 20
) -> tuple[Caption, Caption] | None:
    """A true caption and its closest false relative of the given kind; None if the scene allows none."""
    for _ in range(tries):
        true = true_caption(rng, things)
        false = _falsify(rng, true, kind, variant)
        if false and not false.could_be_true(things):
            return true, false
    return None


def _falsify(rng: np.random.Generator, true: Caption, kind: PairKind, variant: Variant) -> Caption | None:
    first, second = true.subject, true.other
    if kind == "swap_obj":
        return Caption(second, true.relation, first)
    if kind == "swap_att":
        if first.size and second.size and first.size != second.size and rng.random() < 0.5:
            return Caption(replace(first, size=second.size), true.relation, replace(second, size=first.size))
        # With equal nouns, swapped colours would read as swapped objects.
        if first.colour == second.colour or first.noun == second.noun:
            return None
        return Caption(replace(first, colour=second.colour), true.relation, replace(second, colour=first.colour))
    if kind == "replace_rel":
        wrong = OPPOSITE[true.relation] if rng.random() < 0.6 else _other(rng, RELATIONS, true.relation)
        return replace(true, relation=wrong)
    changed = _change(rng, first if (at_first := rng.random() < 0.5) else second, kind, variant)
    return replace(true, subject=changed) if at_first else replace(true, other=changed)


def _change(rng: np.random.Generator, old: Phrase, kind: PairKind, variant: Variant) -> Phrase:
    if kind == "replace_obj":
        return replace(old, noun=_other(rng, NOUNS[variant], old.noun))
    if old.size and rng.random() < 0.4:
        return replace(old, size=_other(rng, SIZES, old.size))
    return replace(old, colour=_other(rng, COLOURS, old.colour))


def _band(position: float, axis: int) -> str | None:
    """Which third of the image, or None within two pixels of a border between thirds."""
    third = IMAGE_SIZE / 3
    if min(abs(position - third), abs(position - 2 * third)) < 2:
        return None
    return _BANDS[axis][min(2, int(position // third))]


def _place(thing: Thing) -> str | None:
    row, column = _band(thing.y, 1), _band(thing.x, 0)
    return f"{row} {column}" if row and column else None


def ask_attribute(rng: np.random.Generator, things: list[Thing], _: Variant) -> Exchange | None:
    """The colour, kind or size of one object."""
    thing = pick(rng, things)
    draw = rng.random()
    if draw < 0.4:
        if sum(t.noun == thing.noun for t in things) > 1:
            return None
        return Exchange(f"What colour is the {thing.noun}?", thing.colour)
    if draw < 0.8:
        if sum(t.colour == thing.colour for t in things) > 1:
            return None
        return Exchange(f"What is the {thing.colour} object?", thing.noun)
    return Exchange(f"Is the {thing.colour} {thing.noun} small or large?", thing.size)


def ask_place(rng: np.random.Generator, things: list[Thing], _: Variant) -> Exchange | None:
    """Where an object is, or what is at a place."""
    thing = pick(rng, things)
    place = _place(thing)
    if place is None:
        return None
    if rng.random() < 0.5:
        return Exchange(f"Where is the {thing.colour} {thing.noun}?", place)
    if any(t is not thing and _place(t) in (None, place) for t in things):
        return None
    return Exchange(f"What is at the {place}?", f"a {thing.colour} {thing.noun}")


def ask_direction(rng: np.random.Generator, things: list[Thing], _: Variant) -> Exchange | None:
    """In which direction one named object lies from another."""
    a, relation, b = pick(rng, clear_pairs(things))
    return Exchange(f"Where is the {a.colour} {a.noun} from the {b.colour} {b.noun}?", relation)


def ask_neighbour(rng: np.random.Generator, things: list[Thing], _: Variant) -> Exchange | None:
    """What lies in a direction from a named object."""
    a, relation, b = pick(rng, clear_pairs(things))
    if any(t is not a and t is not b and loosely_holds(t, relation, b) for t in things):
        return None
    return Exchange(f"What is {_SAID[relation]} the {b.colour} {b.noun}?", f"a {a.colour} {a.noun}")


def ask_presence(rng: np.random.Generator, things: list[Thing], variant: Variant) -> Exchange:
    """Is there such an object? Half of the answers are no, with one attribute wrong or borrowed."""
    thing = pick(rng, things)
    asked = Phrase(thing.colour, thing.noun)
    if rng.random() < 0.5:
        donor = pick(rng, things)
        asked = replace(asked, colour=donor.colour)
        if any(asked.fits(t) for t in things):
            asked = _change(rng, asked, "replace_obj" if rng.random() < 0.5 else "replace_att", variant)
    there = any(asked.fits(t) for t in things)
    return Exchange(f"Is there a {asked}?", "yes" if there else "no")


def ask_relation(rng: np.random.Generator, things: list[Thing], variant: Variant) -> Exchange | None:
    """Is one object ... of another? Half of the answers are no."""
    if rng.random() < 0.5:
        caption, answer = true_caption(rng, things), "yes"
    else:
        pair = hard_negative(rng, things, "swap_obj" if rng.random() < 0.5 else "replace_rel", variant, tries=2)
        if pair is None:
            return None
        caption, answer = pair[1], "no"
    return Exchange(f"Is the {caption.subject} {_SAID[caption.relation]} the {caption.other}?", answer)


def ask_count(rng: np.random.Generator, things: list[Thing], _: Variant) -> Exchange:
    """How many objects there are, in all or of a colour."""
    if rng.random() < 0.5:
        return Exchange("How many objects are there?", _COUNTS[len(things)])
    colour = pick(rng, things).colour if rng.random() < 0.7 else pick(rng, COLOURS)
    return Exchange(f"How many objects are {colour}?", _COUNTS[sum(t.colour == colour for t in things)])


def ask_caption(rng: np.random.Generator, things: list[Thing], _: Variant) -> Exchange:
    """A description of the image."""
    return Exchange(DESCRIBE, str(true_caption(rng, things)))


def ask_without_image(rng: np.random.Generator) -> Exchange:
    """A question about the language alone."""
    draw = rng.random()
    if draw < 0.4:
        relation = pick(rng, RELATIONS)
        return Exchange(f"What is the opposite of {relation}?", OPPOSITE[relation], about_image=False)
    if draw < 0.7:
        number = int(rng.random() * 9)
        return Exchange(f"What number comes after {DIGITS[number]}?", DIGITS[number + 1], about_image=False)
    groups = {"colour": COLOURS, "number": DIGITS, "shape": SHAPES}
    asked, word = pick(rng, tuple(groups)), pick(rng, pick(rng, tuple(groups.values())))
    return Exchange(f"Is {word} a {asked}?", "yes" if word in groups[asked] else "no", about_image=False)


QuestionKind = Literal["attribute", "place", "direction", "neighbour", "presence", "relation", "count", "caption"]
QUESTIONS: dict[QuestionKind, Callable[[np.random.Generator, list[Thing], Variant], Exchange | None]] = {
    "attribute": ask_attribute,
    "place": ask_place,
    "direction": ask_direction,
    "neighbour": ask_neighbour,
    "presence": ask_presence,
    "relation": ask_relation,
    "count": ask_count,
    "caption": ask_caption,
}
"""Gives one exchange of a kind; None when the scene does not allow an unambiguous one (draw again)."""
