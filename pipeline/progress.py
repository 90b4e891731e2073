"""Progress bars of the commands: rate, amount and time left of anything that takes longer than seconds."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from transformers.utils import logging as transformers_logging

console = Console(stderr=True)
"""Progress and messages; results go to standard output."""


class _RateColumn(ProgressColumn):
    """Units a second, from the recent past."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = task.fields.get("unit", "samples")
        return Text(f"{speed:,.1f} {unit}/s" if speed else "", style="progress.data.speed")


@contextmanager
def bars() -> Iterator[Progress]:
    """Bars on standard error; where that is no terminal only their last state is printed."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    # transformers draws bars of its own for each checkpoint it reads, through these.
    transformers_logging.disable_progress_bar()
    with Progress(*columns, console=console) as progress:
        yield progress


def add_bar(progress: Progress, description: str, total: float | None = None, unit: str = "samples") -> TaskID:
    """A bar whose note can be changed with `progress.update(bar, note=...)`."""
    return progress.add_task(description, total=total, unit=unit, note="")


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
