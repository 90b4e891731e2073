"""Shows how far long work is: bars on a terminal, a plain line now and then in a log."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

from rich import progress as rich_progress
from rich.table import Column
from rich.text import Text

from pipeline.ui.console import is_main_process, messages
from storage.errors import UserError
from storage.printable import printable
from storage.progress import SILENT, Progress, ProgressTask

DETAIL_BARS = 12
"""Details, such as workers, that have a bar of their own; more would not fit a terminal."""
LOG_EVERY_S = 30.0
LOG_EVERY_VARIABLE = "CDP_PROGRESS_EVERY_S"
"""Environment variable: seconds between two lines of one task in a log, in place of `LOG_EVERY_S`."""


@contextmanager
def progress_display() -> Iterator[Progress]:
    """Shows the tasks of a block on standard error; all processes of a group but the first show nothing.

    Raises:
        UserError: If `CDP_PROGRESS_EVERY_S` is no number.
    """
    if not is_main_process:
        yield SILENT
    elif messages.is_interactive:
        with _Bars() as bars:
            yield bars
    else:
        log = _Log(_seconds_between_lines())
        try:
            yield log
        finally:
            log.close()


def _seconds_between_lines() -> float:
    text = os.environ.get(LOG_EVERY_VARIABLE) or str(LOG_EVERY_S)
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{LOG_EVERY_VARIABLE} is {text!r}, expected seconds such as 30; correct or unset it") from None


class _RateColumn(rich_progress.ProgressColumn):
    """Units a second, from the recent past."""

    max_refresh = 0.5

    def render(self, task: rich_progress.Task) -> Text:
        speed = task.fields["rate"] or task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {task.fields['unit']}/s" if speed else "", style="progress.data.speed")


class _Bars(rich_progress.Progress):
    """A bar for each task; of details the first few, and a count of the others."""

    def __init__(self) -> None:
        one_line = partial(Column, no_wrap=True)
        super().__init__(
            rich_progress.TextColumn("{task.description}", markup=False, table_column=one_line()),
            rich_progress.BarColumn(bar_width=12),
            rich_progress.MofNCompleteColumn(table_column=one_line()),
            _RateColumn(table_column=one_line()),
            rich_progress.TimeRemainingColumn(elapsed_when_finished=True, table_column=one_line()),
            # Last, because a narrow terminal cuts it.
            rich_progress.TextColumn(
                "{task.fields[note]}{task.fields[hidden]}",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
            ),
            console=messages,
            expand=True,
        )
        self._whole: rich_progress.TaskID | None = None
        self._details: list[rich_progress.TaskID] = []

    def task(
        self, name: str, total: float | None = None, unit: str = "samples", *, detail: bool = False
    ) -> ProgressTask:
        name = printable(name)
        bar = self.add_task(f"  {name}" if detail else name, total=total, unit=unit, note="", hidden="", rate=0.0)
        if detail:
            self._details.append(bar)
            self._choose_details()
        else:
            self._whole = bar
        return _Bar(self, bar)

    def message(self, text: str) -> None:
        _print_line(text)

    def remove(self, bar: rich_progress.TaskID) -> None:
        """Removes a bar; a detail that had no room gets its place."""
        self.remove_task(bar)
        if bar == self._whole:
            self._whole = None
        if bar in self._details:
            self._details.remove(bar)
            self._choose_details()

    def _choose_details(self) -> None:
        for number, bar in enumerate(self._details):
            self.update(bar, visible=number < DETAIL_BARS)
        if self._whole is not None:
            num_hidden = len(self._details) - DETAIL_BARS
            self.update(self._whole, hidden=f"; {num_hidden} more are not shown" if num_hidden > 0 else "")


class _Bar:
    """A task on a terminal."""

    def __init__(self, bars: _Bars, bar: rich_progress.TaskID) -> None:
        self._bars, self._bar = bars, bar

    def advance(self, amount: float = 1) -> None:
        self._bars.advance(self._bar, amount)

    def update(self, *, done: float | None = None, **said: Any) -> None:
        self._bars.update(self._bar, completed=done, **said)

    def remove(self) -> None:
        self._bars.remove(self._bar)


class _Log:
    """A line for each task now and then, and one when it ends: when the next task begins, or with the block."""

    def __init__(self, every_s: float) -> None:
        self.every_s = every_s
        self._open: list[_LogTask] = []

    def task(
        self, name: str, total: float | None = None, unit: str = "samples", *, detail: bool = False
    ) -> ProgressTask:
        if detail:
            return SILENT.task(name)
        for task in [task for task in self._open if task.is_complete]:
            self.end(task)
        self._open.append(_LogTask(self, name, total, unit))
        return self._open[-1]

    def message(self, text: str) -> None:
        _print_line(text)

    def end(self, task: "_LogTask") -> None:
        """Prints the last line of a task."""
        if task in self._open:
            self._open.remove(task)
            task.print_last_line()

    def close(self) -> None:
        """Ends all tasks."""
        for task in list(self._open):
            self.end(task)


class _LogTask:
    """A task in a log."""

    def __init__(self, log: _Log, name: str, total: float | None, unit: str) -> None:
        self._log, self._name, self._total, self._unit = log, name, total, unit
        self._done = 0.0
        self._note = ""
        self._rate: float | None = None
        self._begun_at = time.monotonic()
        self._first: tuple[float, float] | None = None
        """When work was first reported, and what was done by then: a resumed run did that earlier."""
        self._last_line = (self._begun_at, 0.0)

    @property
    def is_complete(self) -> bool:
        """Whether all is done."""
        return self._total is not None and self._done >= self._total

    def advance(self, amount: float = 1) -> None:
        self._first = self._first or (self._begun_at, 0.0)
        self.update(done=self._done + amount)

    def update(
        self,
        *,
        done: float | None = None,
        total: float | None = None,
        note: str | None = None,
        rate: float | None = None,
    ) -> None:
        now = time.monotonic()
        if done is not None:
            self._done = done
            if self._first is None:
                self._first = self._last_line = (now, done)
        self._total = self._total if total is None else total
        self._note = self._note if note is None else note
        self._rate = self._rate if rate is None else rate
        if self._first is not None and not self.is_complete and now >= self._last_line[0] + self._log.every_s:
            rate = self._rate or self._speed_since(self._last_line, now)
            self._print(rate, self._time_left(rate))
            self._last_line = (now, self._done)

    def remove(self) -> None:
        self._log.end(self)

    def print_last_line(self) -> None:
        """Prints what was done and how long it took, if anything was reported."""
        if self._first is not None:
            now = time.monotonic()
            self._print(self._speed_since(self._first, now), f"took {_clock(now - self._begun_at)}")

    def _speed_since(self, then: tuple[float, float], now: float) -> float:
        return max(self._done - then[1], 0) / max(now - then[0], 1e-9)

    def _time_left(self, rate: float) -> str:
        if not rate or self._total is None:
            return ""
        return f"{_clock((self._total - self._done) / rate)} left"

    def _print(self, rate: float, time_shown: str) -> None:
        amount = _amount(self._done) + (f" of {_amount(self._total)}" if self._total is not None else "")
        speed = f"{rate:,.1f} {self._unit}/s" if rate else ""
        parts = (f"{self._name}: {amount} {self._unit}", speed, time_shown, self._note)
        _print_line(", ".join(part for part in parts if part))


def _amount(number: float) -> str:
    return f"{number:,.0f}" if number == int(number) or number >= 100 else f"{number:,.1f}"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _print_line(text: str) -> None:
    messages.print(printable(text), soft_wrap=True, highlight=False, markup=False)


@dataclass(frozen=True)
class NamedProgress:
    """A progress whose tasks have a name before their own, such as that of one of several students."""

    name: str
    shown: Progress

    def task(
        self, name: str, total: float | None = None, unit: str = "samples", *, detail: bool = False
    ) -> ProgressTask:
        """As of `shown`."""
        return self.shown.task(f"{self.name} {name}", total, unit, detail=detail)

    def message(self, text: str) -> None:
        """As of `shown`."""
        self.shown.message(f"{self.name}: {text}")
