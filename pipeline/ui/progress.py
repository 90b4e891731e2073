"""Progress bars of the commands: rate, amount and time left of anything that takes longer than seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

if TYPE_CHECKING:
    # Only named here: `cdp verify` need not load what extracts.
    from pipeline.extraction import WorkerLine

WORKER_LINES = 12
"""Workers that have a line of their own; more would not fit a terminal."""
LOG_EVERY_S = 30.0

is_main_process = os.environ.get("RANK", "0") == "0"
"""False in all but one of the processes that torchrun or accelerate starts: those stay silent."""

console = Console(stderr=True, quiet=not is_main_process)
"""Progress and messages; results go to standard output."""


class _RateColumn(ProgressColumn):
    """Units a second, from the recent past."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        speed = task.fields.get("rate") or task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {task.fields['unit']}/s" if speed else "", style="progress.data.speed")


@contextmanager
def bars() -> Iterator[Progress]:
    """Bars on standard error; where that is no terminal only their last state is printed."""
    columns = (
        TextColumn("{task.description}", table_column=_one_line()),
        BarColumn(bar_width=12),
        MofNCompleteColumn(table_column=_one_line()),
        _RateColumn(table_column=_one_line()),
        TimeRemainingColumn(elapsed_when_finished=True, table_column=_one_line()),
        # Last, because a narrow terminal cuts it.
        TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
    )
    with Progress(*columns, console=console, expand=True) as progress:
        yield progress


def add_bar(progress: Progress, description: str, total: float | None = None, unit: str = "samples") -> TaskID:
    """A bar whose note can be changed with `progress.update(bar, note=...)`."""
    return progress.add_task(description, total=total, unit=unit, note="")


def _one_line() -> Column:
    return Column(no_wrap=True)


class Bars:
    """Bars as `storage.progress.Progress`."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def task(self, name: str, total: float | None = None, unit: str = "samples", *, detail: bool = False) -> Bar:
        """Adds a bar."""
        return Bar(self._progress, add_bar(self._progress, name, total, unit))

    def message(self, text: str) -> None:
        """Prints a line above the bars."""
        console.print(text, soft_wrap=True, highlight=False, markup=False)


class Bar:
    """One bar as `storage.progress.ProgressTask`."""

    def __init__(self, progress: Progress, bar: TaskID) -> None:
        self._progress, self._bar = progress, bar

    def advance(self, amount: float = 1) -> None:
        """Adds to the amount done."""
        self._progress.advance(self._bar, amount)

    def update(
        self,
        *,
        done: float | None = None,
        total: float | None = None,
        note: str | None = None,
        rate: float | None = None,
    ) -> None:
        """Sets what is given."""
        fields: dict[str, Any] = {name: value for name, value in (("note", note), ("rate", rate)) if value is not None}
        self._progress.update(self._bar, completed=done, total=total, **fields)

    def remove(self) -> None:
        """Takes the bar off the screen."""
        self._progress.remove_task(self._bar)


class ExtractionBar:
    """Shows an extraction: all samples, bytes and shards, and a line for each of the first workers.

    Where standard error is no terminal, a plain line now and then.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bar = add_bar(progress, "extract")
        self._lines: dict[str, TaskID] = {}
        self._bytes = self._shards = self._num_workers = self._done = self._total = 0
        self._others = ""
        self._rate = 0.0
        self._logged_at = time.monotonic()

    def start(self, total_samples: int, done_samples: int) -> None:
        """Before the first shard."""
        self._total, self._done = total_samples, done_samples
        self._progress.update(self._bar, total=total_samples, completed=done_samples, note="workers start")

    def advance(self, samples: int) -> None:
        """Samples observed since the last call."""
        self._done += samples
        self._progress.advance(self._bar, samples)

    def shard_done(self, stored_bytes: int) -> None:
        """A shard was committed."""
        self._bytes += stored_bytes
        self._shards += 1

    def workers(self, lines: Sequence[WorkerLine]) -> None:
        """What each worker is at: those with a line keep it until they end, then another one gets its place."""
        self._num_workers = len(lines)
        self._rate = sum(line.samples_per_s for line in lines)
        by_name = {line.name: line for line in lines}
        for name in self._lines.keys() - by_name.keys():
            self._progress.remove_task(self._lines.pop(name))
        for line in lines:
            if line.name not in self._lines and len(self._lines) < WORKER_LINES:
                self._lines[line.name] = add_bar(self._progress, f"  {line.name}")
        for name, bar in self._lines.items():
            line = by_name[name]
            shards = ", ".join(map(str, line.shards))
            self._progress.update(
                bar,
                total=line.total_samples,
                completed=line.done_samples,
                rate=line.samples_per_s,
                note=f"shard {shards}" if shards else "",
            )
        hidden = len(lines) - len(self._lines)
        self._progress.update(
            self._bar,
            rate=self._rate,
            note=self._summary() + (f"; {hidden} workers are not shown" if hidden else ""),
        )
        if not console.is_terminal and time.monotonic() > self._logged_at + LOG_EVERY_S:
            self._logged_at = time.monotonic()
            console.print(self._plain_line(), soft_wrap=True, highlight=False)

    def _summary(self) -> str:
        return f"{self._num_workers} workers, {self._shards:,} shards, {self._bytes / 1e6:,.1f} MB"

    def _plain_line(self) -> str:
        line = f"extract: {self._done:,} of {self._total:,} samples, {self._rate:,.1f} samples/s, {self._summary()}"
        if self._rate:
            line += f", {timedelta(seconds=round((self._total - self._done) / self._rate))} left"
        return line
