"""Lines of answered items: written as they come, and read again with every value checked."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from stages.evaluation.metrics import ScoredItem
from stages.evaluation.suites.suite import Answer, Counts, Item, Likelihood
from stages.evaluation.suites.suite_files import fields
from storage.digests import parse_json
from storage.errors import UserError
from storage.regular_files import open_regular

ITEMS: Final = "items*.jsonl"
"""Files of a suite's folder: `items.jsonl`, and one more of each further process of torchrun."""
MAX_COUNT: Final = 1e6
"""Most that one item adds to a count; the makers' scripts add a few units."""

_TO_DO: Final = "restore the file, or remove this line and run the same `cdp evaluate` again, which asks this item anew"


class AskedQuestion(NamedTuple):
    """A question as it was saved."""

    prompt: str
    candidates: tuple[str, ...]
    pictures: tuple[str, ...]
    """sha256 of the files that it shows."""


class AnsweredItem(NamedTuple):
    """A line of an items file."""

    id: str
    answers: tuple[Answer, ...]
    scored: ScoredItem
    questions: tuple[AskedQuestion, ...] = ()
    expected: Any = None
    """As the suite says it; any JSON."""


def item_line(item: Item, answers: Iterable[Answer], counts: Counts, pictures: Sequence[Sequence[str]]) -> str:
    """An item as a line of JSON, with what people want to see of it.

    `pictures` are the sha256 of the files that each question shows.
    """
    shown = {
        "id": item.id,
        "kinds": item.kinds,
        "unit": item.unit or item.id,
        "questions": [
            {
                "prompt": one.prompt,
                "pictures": [str(picture.source) for picture in one.pictures],
                "sha256": digests,
            }
            | ({"candidates": one.candidates} if one.candidates else {})
            for one, digests in zip(item.questions, pictures, strict=True)
        ],
        "expected": item.expected,
        "answers": list(answers),
        "counts": {name: float(value) for name, value in counts.items()},
    }
    return json.dumps(shown)


def read_items(folder: Path) -> dict[str, AnsweredItem]:
    """The items that were answered, of all processes, by id; a line that was cut short by a kill is left out.

    Raises:
        UserError: If a line is none that `item_line` writes; names file and line.
    """
    found = {}
    for path in sorted(folder.glob(ITEMS)):
        for number, line in enumerate(whole_lines(path), 1):
            try:
                item = _answered(line, f"{path}, line {number}")
            except UserError as error:
                raise UserError(f"{error}; {_TO_DO}") from error
            found[item.id] = item
    return found


def whole_lines(path: Path) -> Iterator[bytes]:
    """Lines of a file that end."""
    with open_regular(path) as file:
        yield from (line for line in file if line.endswith(b"\n"))


def _answered(line: bytes, where: str) -> AnsweredItem:
    record = parse_json(line, where, "an answered item was expected")
    types: dict[str, type] = {"questions": list, "id": str, "unit": str, "kinds": list, "answers": list, "counts": dict}
    questions, key, unit, kinds, answers, counts = fields(record, where, **types)
    if not kinds or any(type(kind) is not str for kind in kinds):
        raise UserError(f"{where}: kinds {kinds!r:.100}; expected one text or more")
    for name, count in counts.items():
        if not (_is_number(count) and 0 <= count <= MAX_COUNT):
            raise UserError(f"{where}: count {name!r:.100} is {count!r:.100}; expected 0 to {MAX_COUNT:,.0f}")
    scored = ScoredItem(tuple(kinds), unit, counts)
    asked = tuple(_question(question, where) for question in questions)
    item = AnsweredItem(key, tuple(_answer(one, where) for one in answers), scored, asked, record.get("expected"))
    if len(item.answers) != len(item.questions):
        raise UserError(f"{where}: {len(answers)} answers to {len(questions)} questions; expected as many")
    return item


def _question(saved: Any, where: str) -> AskedQuestion:
    prompt, digests = fields(saved, where, prompt=str, sha256=list)
    candidates = saved.get("candidates", [])
    for name, texts in (("candidates", candidates), ("sha256", digests)):
        if not isinstance(texts, list) or any(type(one) is not str for one in texts):
            raise UserError(f"{where}: {name} {texts!r:.100}; expected a list of texts")
    return AskedQuestion(prompt, tuple(candidates), tuple(digests))


def _answer(saved: Any, where: str) -> Answer:
    if isinstance(saved, str):
        return saved
    if not isinstance(saved, list) or not all(map(_is_likelihood, saved)):
        expected = "expected a text, or a list of [log-probability, number of tokens, log-probability of the end]"
        raise UserError(f"{where}: answer {saved!r:.100}; {expected}")
    return tuple(Likelihood(*one) for one in saved)


def _is_likelihood(saved: Any) -> bool:
    return (
        isinstance(saved, list)
        and len(saved) == len(Likelihood._fields)
        and all(map(_is_number, saved))
        and isinstance(saved[1], int)
        and saved[1] > 0
    )


def _is_number(value: Any) -> bool:
    """Whether it is a number that can be computed with; an integer of 400 digits cannot."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False
