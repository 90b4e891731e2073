"""What came of a suite: the identity of the run, the folder of its answers, and the metrics."""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat, ValidationError

from stages.evaluation.answered_items import ITEMS, AnsweredItem, read_items, whole_lines
from stages.evaluation.metrics import interval_95, metrics_of_always_yes, suite_metrics
from stages.evaluation.suites.registry import SUITES
from stages.evaluation.suites.suite import Item, Protocol
from storage.errors import CorruptData, UserError, disk_errors_named
from storage.regular_files import read_regular
from storage.samples.image_settings import ImageConfig
from storage.stores import Store, open_store
from storage.stores.folder_owner import owned
from storage.strict_model import StrictModel

RESULT_FILE: Final = "result.json"
IDENTITY_FILE: Final = "run.json"
PATIENCE_S: Final = 1800.0
POLL_S: Final = 0.2


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
    num_items: int | None = None
    """Items asked, those without their pictures among them; None in runs of older versions."""
    limit: int | None = None
    """Items of each kind that were asked at most; None for all."""


_IDENTITY: Final = tuple(name for name in SuiteRun.model_fields if name not in {"model", "num_items", "limit"})
"""Fields in which runs that are gone on with are the same."""


class Metric(StrictModel):
    """A number of a suite, in its makers' unit: percent, or points."""

    value: FiniteFloat
    interval_95: tuple[FiniteFloat, FiniteFloat]
    """By bootstrap over what the suite draws as a whole."""
    chance: FiniteFloat | None
    """What guessing gets, where that is known; of F1, what always saying yes gets on these items."""


class SuiteResult(StrictModel):
    """Saved as `result.json` beside the items."""

    run: SuiteRun
    metrics: dict[str, dict[str, Metric]]
    """By kind and name."""
    num_items: dict[str, int]
    """Scored, by kind, of the kinds that have metrics: a suite may have thousands that it only averages."""
    num_missing: int
    """Items without their images, which were not asked."""
    missing: tuple[str, ...] = ()
    """The first of them."""
    num_missing_of: dict[str, int] = Field(default_factory=dict)
    """By kind, of the kinds that have metrics, and of those that all their images are missing of."""
    seconds: float
    """Of answering what this command asked, with decoding of images, without loading and trying the model.

    Workers of a cluster load it within this time.
    """
    items_per_s: float
    """Of that time; 0 where everything was answered before."""

    @property
    def main(self) -> Metric | None:
        """The number that stands for the suite; None where answers do not give it, as the makers' server has labels."""
        kind, name = SUITES[self.run.suite].main
        return self.metrics.get(kind, {}).get(name)


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

    def replace_all(self, lines: str) -> None:
        """Has these lines in place of those of all processes, which have ended."""
        open_store(self.path.parent).write(self.path.name, lines.encode())
        for path in self.path.parent.glob(ITEMS):
            if path != self.path:
                path.unlink()


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
            for path in (folder / IDENTITY_FILE, folder / RESULT_FILE, folder / "answers.json", *folder.glob(ITEMS)):
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
    return difference_of(begun, run, "this command's", _IDENTITY)


def difference_of(run: SuiteRun, other: SuiteRun, whose: str, names: Iterable[str]) -> str:
    """In which of these fields a run differs from another one, which is `whose`, in words; empty if in none."""
    for name in names:
        if (found := getattr(run, name)) != (expected := getattr(other, name)):
            return (
                _other_items(run, other, whose) if name == "items" else f"its {name} is {found}, {whose} is {expected}"
            )
    return ""


def _other_items(run: SuiteRun, other: SuiteRun, whose: str) -> str:
    if run.num_items is None or other.num_items is None:
        return f"its items are not {whose}"
    if (run.num_items, run.limit) != (other.num_items, other.limit):
        counts = [f"{one.num_items:,}" + f" (--limit {one.limit})" * (one.limit is not None) for one in (run, other)]
        return f"its items are {counts[0]}, {whose} are {counts[1]}"
    return (
        f"its {run.num_items:,} items are as many as {whose}, and some have other ids, prompts, pictures or labels: "
        "the suite's files are others, or another version read them"
    )


def _wait_for_first(store: Store, run: SuiteRun, *, replace: bool) -> None:
    """Waits until the first process has begun or gone on with the folder, and has made room in it if it is to."""
    patience = PATIENCE_S
    while not store.exists(IDENTITY_FILE) or (replace and _difference(store, run)):
        if (patience := patience - POLL_S) < 0:
            raise UserError(f"{store.url}: the first process did not begin within {PATIENCE_S:.0f} s; see its error")
        time.sleep(POLL_S)


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
    always_yes = metrics_of_always_yes(suite, scored)
    num_items = Counter(kind for one in scored for kind in one.kinds)
    return SuiteResult(
        run=run,
        metrics={
            kind: {
                name: Metric(
                    value=float(value_R[0]),
                    interval_95=interval_95(value_R),
                    chance=_chance(suite.chance_of(kind, name, run.protocol), always_yes.get(kind, {}).get(name)),
                )
                for name, value_R in of_kind.items()
            }
            for kind, of_kind in values.items()
        },
        num_items={kind: num_items[kind] for kind in num_items if kind in values},
        num_missing=len(missing),
        missing=tuple(item.id for item in missing[:20]),
        num_missing_of=Counter(
            kind for item in missing for kind in item.kinds if kind in values or kind in item.kinds[:1]
        ),
        seconds=seconds,
        items_per_s=num_asked / seconds if num_asked else 0.0,
    )


def _chance(guessing: float | None, always_yes: NDArray[np.float64] | None) -> float | None:
    return float(always_yes[0]) if guessing is None and always_yes is not None else guessing


def write_server_files(folder: Path, name: str, answered: Iterable[AnsweredItem]) -> list[Path]:
    """Writes what the makers' server of a suite takes beside its result; most suites have none."""
    files = SUITES[name].server_files({one.id: one.answers for one in answered})
    for file, content in files.items():
        open_store(folder).write(file, json.dumps(content).encode())
    return [folder / file for file in files]


def note_on_guessing(result: SuiteResult) -> str:
    """What the levels of guessing are, where a reader may take them for another thing; mostly empty."""
    has_f1 = any((f1 := of_kind.get("f1")) and f1.chance is not None for of_kind in result.metrics.values())
    return "guessing of f1 is what always saying yes gets on these items" if has_f1 else ""


def read_result(path: Path) -> SuiteResult:
    """A result that `cdp evaluate` saved: its file, or the folder of a suite.

    Raises:
        UserError: If it is none, or of a suite that this version does not have.
    """
    file = path / RESULT_FILE if path.is_dir() else path
    try:
        result = SuiteResult.model_validate_json(read_regular(file))
    except (OSError, CorruptData) as error:
        raise UserError(f"no result of `cdp evaluate` at {path}: {error}; name the folder of a suite") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        found = f"{file} is no result of `cdp evaluate`: {where}: {first['msg']} ({error.error_count()} faults)"
        raise UserError(f"{found}; name the {RESULT_FILE} that it saved") from error
    if result.run.suite not in SUITES:
        found = f"{file} is a result of a suite {result.run.suite!r:.100}"
        raise UserError(f"{found}; this version has {', '.join(SUITES)}; upgrade compodistill, or mend the file")
    return result
