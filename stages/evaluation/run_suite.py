"""Asks a model a suite's items, those about the same pictures side by side, and keeps each answer as it comes."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from stages.evaluation.answering.answerer import Answerer
from stages.evaluation.config import SuiteConfig
from stages.evaluation.result import item_line
from stages.evaluation.suites.pictures import PictureSource
from stages.evaluation.suites.registry import find_suite
from stages.evaluation.suites.suite import Item, Protocol, Question, Suite
from stages.evaluation.suites.suite_files import SuiteFiles
from storage.errors import UserError
from storage.progress import SILENT, ProgressTask

ITEMS_AT_ONCE: Final = 32
"""Items whose answers are saved together."""
_SHOWN: Final = 5
_NOT_SHOWN = SILENT.task("ask")


@dataclass(frozen=True)
class LoadedSuite:
    """A suite's items, as they are asked.

    Attributes:
        items: those that have their pictures.
        missing: those that have not.
    """

    suite: Suite
    protocol: Protocol
    blind: bool
    items: list[Item]
    missing: list[Item]


def load_suite(name: str, config: SuiteConfig) -> LoadedSuite:
    """Reads a suite's folder and looks for its pictures.

    Raises:
        UserError: If files are missing or have another layout, or pictures are missing that may not be; names what to
            fetch.
    """
    suite, protocol = find_suite(name, config.protocol)
    files = SuiteFiles(config.data, config.images, suite.fetch)
    items = _first_of_each_kind(suite.load(files, protocol), config.limit)
    if not items:
        raise UserError(f"{config.data} has no items of {name}; {suite.fetch}")
    if twice := [key for key, count in Counter(item.id for item in items).items() if count > 1]:
        raise UserError(f"{config.data}: {len(twice)} items of {name} stand there twice, the first {twice[0]}")
    pictures = dict.fromkeys(source for item in items for source in _sources(item))
    absent = {source for source in pictures if not source.exists()}
    missing = [item for item in items if any(source in absent for source in _sources(item))]
    if missing and (not config.allow_missing_images or len(missing) == len(items)):
        shown = ", ".join(str(source) for source in pictures if source in absent)[: _SHOWN * 100]
        raise UserError(
            f"{len(absent)} of {len(pictures)} images of {name} are missing, so {len(missing)} of {len(items)} items "
            f"cannot be asked: {shown}. {suite.fetch}; or name the folder of images with --images, or count such "
            "items as missing with --allow-missing-images"
        )
    gone = {item.id for item in missing}
    return LoadedSuite(suite, protocol, config.blind, [item for item in items if item.id not in gone], missing)


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


def _first_of_each_kind(items: Iterable[Item], limit: int | None) -> list[Item]:
    counts: Counter[str] = Counter()
    chosen = []
    for item in items:
        counts[item.kinds[0]] += 1
        if limit is None or counts[item.kinds[0]] <= limit:
            chosen.append(item)
    return chosen


def _sources(item: Item) -> Iterator[PictureSource]:
    return (source for question in item.questions for picture in question.pictures for source in picture.sources)


def _sharing(question: Question) -> tuple[str, bool]:
    """Equal for questions that can share work, and neighbours when sorted."""
    shown = [(str(picture.source), picture.crop, picture.marks) for picture in question.pictures]
    return str(shown), bool(question.candidates)
