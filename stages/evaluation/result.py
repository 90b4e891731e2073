"""What came of a suite: the identity of the run, each item's answers as they come, and the metrics."""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from pydantic import ValidationError

from stages.evaluation.metrics import ScoredItem, interval_95, suite_metrics
from stages.evaluation.suites.pictures import PictureSource
from stages.evaluation.suites.registry import SUITES
from stages.evaluation.suites.suite import Answer, Counts, Item, Likelihood, Protocol
from storage.digests import parse_json
from storage.errors import CorruptData, UserError, disk_errors_named
from storage.regular_files import open_regular, read_regular
from storage.samples.image_settings import ImageConfig
from storage.stores import Store, open_store
from storage.stores.folder_owner import owned
from storage.strict_model import StrictModel

RESULT_FILE: Final = "result.json"
IDENTITY_FILE: Final = "run.json"
PATIENCE_S: Final = 1800.0
POLL_S: Final = 0.2
_ITEMS: Final = "items*.jsonl"


class SuiteRun(StrictModel):
    """What answers are of; runs that differ in one of these are not mixed."""

    suite: str
    protocol: Protocol
    blind: bool
    """Whether grey pictures were shown."""
    items: str
    """Digest of the items asked: prompts, candidates, expected answers, names of pictures."""
    model: str
    """Name or folder that the model was loaded from."""
    weights: str
    """sha256 of its weights."""
    dtype: str
    """Of the weights, such as `bfloat16`."""
    image_backend: str
    """Class that made the pixels."""
    images: ImageConfig
    """How pictures were read and placed."""


class Metric(StrictModel):
    """A number of a suite, in its makers' unit: percent, or points."""

    value: float
    interval_95: tuple[float, float]
    """By bootstrap over what the suite draws as a whole."""
    chance: float | None
    """What guessing gets, where that is known."""


class SuiteResult(StrictModel):
    """Saved as `result.json` beside the items."""

    run: SuiteRun
    metrics: dict[str, dict[str, Metric]]
    """By kind and name."""
    num_items: dict[str, int]
    """Scored, by kind."""
    num_missing: int
    """Items without their images, which were not asked."""
    missing: tuple[str, ...] = ()
    """The first of them."""
    seconds: float
    """Of answering what this command asked, with decoding of images, without loading the model."""
    items_per_s: float
    """Of that time; 0 where everything was answered before."""

    @property
    def main(self) -> Metric:
        """The number that stands for the suite.

        Raises:
            UserError: If the answers do not give it, as where the makers' server alone has the labels.
        """
        kind, name = SUITES[self.run.suite].main
        if (found := self.metrics.get(kind, {}).get(name)) is None:
            raise UserError(f"these answers to {self.run.suite} give no {name} of {kind}")
        return found


class AnsweredItem(NamedTuple):
    """A line of the items' file."""

    id: str
    answers: tuple[Answer, ...]
    scored: ScoredItem


def item_line(item: Item, answers: Iterable[Answer], counts: Counts, digests: Mapping[PictureSource, str]) -> str:
    """An item as a line of JSON, with what people want to see of it, and the sha256 of each picture's file."""
    shown = {
        "id": item.id,
        "kinds": item.kinds,
        "unit": item.unit or item.id,
        "questions": [
            {
                "prompt": one.prompt,
                "pictures": [str(picture.source) for picture in one.pictures],
                "sha256": [digests[picture.source] for picture in one.pictures],
            }
            | ({"candidates": one.candidates} if one.candidates else {})
            for one in item.questions
        ],
        "expected": item.expected,
        "answers": list(answers),
        "counts": {name: float(value) for name, value in counts.items()},
    }
    return json.dumps(shown)


@dataclass(frozen=True)
class ItemsFile:
    """The file that a process appends answered items to."""

    path: Path
    answered: Mapping[str, AnsweredItem]
    """What was there already, of all processes."""

    def append(self, lines: str) -> None:
        """Adds whole lines; they outlive the process."""
        with disk_errors_named(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(lines)


@contextmanager
def begun_items(folder: Path, run: SuiteRun, rank: int = 0, *, replace: bool = False) -> Iterator[ItemsFile]:
    """The folder of a suite's answers, made or gone on with, for the process with this rank.

    Answers of another run are removed if `replace` says so.

    Raises:
        UserError: If it holds answers of another run; says what differs.
        FolderInUse: If another command works in it.
    """
    store = open_store(folder)
    with owned(folder) if rank == 0 else nullcontext():
        if rank > 0:
            _wait_for_first(store, run, replace=replace)
        differing = _difference(store, run)
        if differing and rank == 0 and replace:
            for path in (folder / IDENTITY_FILE, folder / RESULT_FILE, folder / "answers.json", *folder.glob(_ITEMS)):
                path.unlink(missing_ok=True)
        elif differing:
            found = f"{folder} holds answers of another run: {differing}"
            raise UserError(f"{found}; name another --output, or remove the folder")
        if not store.exists(IDENTITY_FILE):
            store.write(IDENTITY_FILE, run.to_json().encode())
        path = folder / ("items.jsonl" if rank == 0 else f"items-{rank}.jsonl")
        if path.exists():
            # A line that a kill cut short would run into the next.
            whole = sum(map(len, whole_lines(path)))
            with disk_errors_named(path):
                os.truncate(path, whole)
        yield ItemsFile(path, read_items(folder))


def _difference(store: Store, run: SuiteRun) -> str:
    """What the run that began a folder has other than this one; empty if nothing, or where none began."""
    if not store.exists(IDENTITY_FILE):
        return ""
    try:
        begun = SuiteRun.model_validate_json(store.read(IDENTITY_FILE))
    except ValidationError:
        return f"its {IDENTITY_FILE} is of another version"
    for name in SuiteRun.model_fields:
        if name != "model" and (was := getattr(begun, name)) != (now := getattr(run, name)):
            return f"its {name} is {was}, this command's is {now}"
    return ""


def _wait_for_first(store: Store, run: SuiteRun, *, replace: bool) -> None:
    """Waits until the first process has begun or gone on with the folder, and has made room in it if it is to."""
    patience = PATIENCE_S
    while not store.exists(IDENTITY_FILE) or (replace and _difference(store, run)):
        if (patience := patience - POLL_S) < 0:
            raise UserError(f"{store.url}: the first process did not begin within {PATIENCE_S:.0f} s; see its error")
        time.sleep(POLL_S)


def read_items(folder: Path) -> dict[str, AnsweredItem]:
    """The items that were answered, of all processes, by id; a line that was cut short by a kill is left out.

    Raises:
        UserError: If a file is damaged elsewhere.
    """
    found = {}
    for path in sorted(folder.glob(_ITEMS)):
        for line in whole_lines(path):
            try:
                record = parse_json(line, str(path), "remove the folder's items")
                answers = tuple(_answer(answer) for answer in record["answers"])
                scored = ScoredItem(tuple(record["kinds"]), record["unit"], record["counts"])
                found[record["id"]] = AnsweredItem(record["id"], answers, scored)
            except (CorruptData, KeyError, TypeError) as error:
                raise UserError(f"{path}: a line is no answered item ({error}); remove the folder's items") from error
    return found


def whole_lines(path: Path) -> Iterator[bytes]:
    """Lines of a file that end."""
    with open_regular(path) as file:
        yield from (line for line in file if line.endswith(b"\n"))


def _answer(saved: Any) -> Answer:
    return saved if isinstance(saved, str) else tuple(Likelihood(*one) for one in saved)


def items_digest(items: Iterable[Item]) -> str:
    """A digest of what is asked; the same wherever the suite's folder lies."""
    asked = [
        [item.id, item.kinds, item.unit, item.expected]
        + [
            [one.prompt, one.candidates, one.first_token_only, one.max_new_tokens]
            + [[str(picture.source).rsplit("/", 1)[-1], picture.crop, str(picture.marks)] for picture in one.pictures]
            for one in item.questions
        ]
        for item in sorted(items, key=lambda item: item.id)
    ]
    # In ASCII: a stranger's text may be no Unicode.
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def make_result(
    run: SuiteRun,
    answered: Iterable[AnsweredItem],
    missing: list[Item],
    num_resamples: int,
    seconds: float,
    num_asked: int,
) -> SuiteResult:
    """Sums up all answered items of a suite."""
    suite, scored = SUITES[run.suite], [one.scored for one in answered]
    values = suite_metrics(suite, scored, num_resamples)
    return SuiteResult(
        run=run,
        metrics={
            kind: {
                name: Metric(
                    value=float(value_R[0]),
                    interval_95=interval_95(value_R),
                    chance=suite.chance_of(kind, name, run.protocol),
                )
                for name, value_R in of_kind.items()
            }
            for kind, of_kind in values.items()
        },
        num_items={
            kind: sum(kind in one.kinds for one in scored)
            for kind in dict.fromkeys(kind for one in scored for kind in one.kinds)
        },
        num_missing=len(missing),
        missing=tuple(item.id for item in missing[:20]),
        seconds=seconds,
        items_per_s=num_asked / seconds if num_asked else 0.0,
    )


def write_server_files(folder: Path, name: str, answered: Iterable[AnsweredItem]) -> list[Path]:
    """Writes what the makers' server of a suite takes beside its result; most suites have none."""
    files = SUITES[name].server_files({one.id: one.answers for one in answered})
    for file, content in files.items():
        open_store(folder).write(file, json.dumps(content).encode())
    return [folder / file for file in files]


def read_result(path: Path) -> SuiteResult:
    """A result that `cdp evaluate` saved: its file, or the folder of a suite.

    Raises:
        UserError: If it is none.
    """
    file = path / RESULT_FILE if path.is_dir() else path
    try:
        return SuiteResult.model_validate_json(read_regular(file))
    except (OSError, CorruptData) as error:
        raise UserError(f"no result of `cdp evaluate` at {path}: {error}; name the folder of a suite") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        found = f"{file} is no result of `cdp evaluate`: {where}: {first['msg']} ({error.error_count()} faults)"
        raise UserError(f"{found}; name the {RESULT_FILE} that it saved") from error
