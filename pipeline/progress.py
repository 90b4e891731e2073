"""Progress bars of the commands: rate, amount and time left of anything that takes longer than seconds."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

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

is_main_process = os.environ.get("RANK", "0") == "0"
"""False in all but one of the processes that torchrun or accelerate starts: those stay silent."""

console = Console(stderr=True, quiet=not is_main_process)
"""Progress and messages; results go to standard output."""


class _RateColumn(ProgressColumn):
    """Units a second, from the recent past."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
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


class ExtractionBar:
    """Shows an extraction: samples, bytes written, shards."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bar = add_bar(progress, "extract")
        self._bytes = 0
        self._shards = 0

    def start(self, total_samples: int, done_samples: int, workers: int) -> None:
        """Before the first shard."""
        self._progress.update(self._bar, total=total_samples, completed=done_samples, note=f"{workers} workers start")

    def advance(self, samples: int) -> None:
        """Samples observed since the last call."""
        self._progress.advance(self._bar, samples)

    def shard_done(self, stored_bytes: int) -> None:
        """A shard was committed."""
        self._bytes += stored_bytes
        self._shards += 1
        self._progress.update(self._bar, note=f"{self._shards} shards, {self._bytes / 1e6:,.1f} MB")
