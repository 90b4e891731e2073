"""Asks a model a suite's items, those about the same pictures side by side, and saves each answer as it comes."""

from collections.abc import Callable, Sequence
from typing import Final

from stages.evaluation.answering.answerer import Answerer
from stages.evaluation.loaded_suite import LoadedSuite
from stages.evaluation.result import item_line
from stages.evaluation.suites.suite import Item, Question
from storage.progress import SILENT, ProgressTask

ITEMS_AT_ONCE: Final = 32
"""Items whose answers are saved together."""
_NOT_SHOWN = SILENT.task("ask")


def ask_items(
    answerer: Answerer,
    loaded: LoadedSuite,
    items: Sequence[Item],
    save: Callable[[str], None],
    task: ProgressTask = _NOT_SHOWN,
) -> None:
    """Asks `items` and saves each as a line of JSON, in no promised order.

    Raises:
        UserError: If a picture cannot be read, or a question cannot be asked; names the item.
    """
    # Items about the same pictures stand side by side then.
    ordered = sorted(items, key=lambda item: [_sharing(question) for question in item.questions])
    for start in range(0, len(ordered), ITEMS_AT_ONCE):
        chunk = ordered[start : start + ITEMS_AT_ONCE]
        questions = [question for item in chunk for question in item.questions]
        order = sorted(range(len(questions)), key=lambda number: _sharing(questions[number]))
        found = dict(zip(order, answerer.answers([questions[number] for number in order]), strict=True))
        in_order = iter([found[number] for number in range(len(questions))])
        lines = []
        for item in chunk:
            answers = [next(in_order) for _ in item.questions]
            lines.append(item_line(item, answers, loaded.suite.count(item, answers, loaded.protocol)))
        save("".join(f"{line}\n" for line in lines))
        task.advance(len(chunk))


def _sharing(question: Question) -> tuple[str, bool]:
    """Equal for questions that can share work, and neighbours when sorted."""
    shown = [(str(picture.source), picture.crop, picture.marks) for picture in question.pictures]
    return str(shown), bool(question.candidates)
