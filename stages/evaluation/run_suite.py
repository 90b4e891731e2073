"""Asks a model a suite's items, those about the same pictures side by side."""

import hashlib
from collections.abc import Sequence
from typing import Final

from stages.evaluation.answering.answerer import Answerer
from stages.evaluation.loaded_suite import LoadedSuite
from stages.evaluation.result import item_line
from stages.evaluation.suites.suite import Item, Question

ITEMS_AT_ONCE: Final = 32
"""Items whose answers are saved together."""


def chunks_of(items: Sequence[Item]) -> list[list[Item]]:
    """All items in parts that are answered and saved together; items about the same pictures stand side by side."""
    ordered = sorted(items, key=lambda item: [_sharing(question) for question in item.questions])
    return [ordered[start : start + ITEMS_AT_ONCE] for start in range(0, len(ordered), ITEMS_AT_ONCE)]


def ask_chunk(answerer: Answerer, loaded: LoadedSuite, items: Sequence[Item]) -> str:
    """Asks items; each with its answers as a line of JSON.

    Raises:
        UserError: If a picture cannot be read, or a question cannot be asked; names it.
    """
    questions = [question for item in items for question in item.questions]
    order = sorted(range(len(questions)), key=lambda number: _sharing(questions[number]))
    found = dict(zip(order, answerer.answers([questions[number] for number in order]), strict=True))
    in_order = iter([found[number] for number in range(len(questions))])
    lines = []
    # Of the files as they are: they link an item to a stored sample with the same picture.
    sources = {picture.source for question in questions for picture in question.pictures}
    digests = {source: hashlib.sha256(source.read()).hexdigest() for source in sources}
    for item in items:
        answers = [next(in_order) for _ in item.questions]
        lines.append(item_line(item, answers, loaded.suite.count(item, answers, loaded.protocol), digests))
    return "".join(f"{line}\n" for line in lines)


def _sharing(question: Question) -> tuple[str, bool]:
    """Equal for questions that can share work, and neighbours when sorted."""
    shown = [(str(picture.source), picture.crop, picture.marks) for picture in question.pictures]
    return str(shown), bool(question.candidates)
