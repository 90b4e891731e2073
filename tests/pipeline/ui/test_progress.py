import io
import re

import pytest
from rich.console import Console

from pipeline.ui import progress
from pipeline.ui.progress import DETAIL_BARS, LOG_EVERY_VARIABLE, progress_display
from storage.errors import UserError
from storage.progress import SILENT, Progress


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    return shown_on(monkeypatch, force_terminal=True)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    return shown_on(monkeypatch, force_terminal=False)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> "Clock":
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


class Clock:
    """A clock that a test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def shown_on(monkeypatch: pytest.MonkeyPatch, force_terminal: bool) -> io.StringIO:
    text = io.StringIO()
    console = Console(file=text, force_terminal=force_terminal, width=160, height=40, no_color=True)
    monkeypatch.setattr(progress, "messages", console)
    monkeypatch.setenv("TERM", "xterm")
    return text


def last_state(text: io.StringIO) -> list[str]:
    """The lines of the last full redraw."""
    lines = [
        part for part in text.getvalue().replace("\x1b[2K", "").split("\n") if "extract" in part or "node-" in part
    ]
    first = max(number for number, shown in enumerate(lines) if "extract" in shown)
    return [shown.strip() for shown in lines[first:]]


def test_a_terminal_shows_the_whole_and_each_worker_at_work(terminal: io.StringIO) -> None:
    with progress_display() as shown:
        whole = shown.task("extract", 1000)
        whole.update(done=200)
        whole.advance(40)
        whole.update(rate=5.5, note="2 workers")
        for number, (rate, shards) in enumerate([(2.0, "7"), (3.5, "8, 9")]):
            shown.task(f"node-{number} 10{number}", 256, detail=True).update(done=3, rate=rate, note=f"shard {shards}")
    first, second, third = last_state(terminal)
    assert "240/1000" in first
    assert "5.5 samples/s" in first
    assert "2 workers" in first
    assert second.startswith("node-0 100")
    assert "2.0 samples/s" in second
    assert "shard 7" in second
    assert "3.5 samples/s" in third
    assert "shard 8, 9" in third


def test_only_so_many_workers_have_a_bar_and_one_that_ends_makes_room(terminal: io.StringIO) -> None:
    with progress_display() as shown:
        shown.task("extract", 1000)
        workers = [shown.task(f"node-{number}", detail=True) for number in range(DETAIL_BARS + 3)]
        for worker in workers[:2]:
            worker.remove()
    whole, *lines = last_state(terminal)
    assert "1 more are not shown" in whole
    assert [line.split()[0] for line in lines] == [f"node-{number}" for number in range(2, DETAIL_BARS + 2)]


def test_names_and_notes_with_brackets_are_shown_as_they_are(terminal: io.StringIO) -> None:
    with progress_display() as shown:
        shown.task("extract [/] [red]x", 3).update(done=1, note="[bold]y")
        shown.message("note: [/] a folder [x]")
    assert "extract [/] [red]x" in terminal.getvalue()
    assert "[bold]y" in terminal.getvalue()
    assert "note: [/] a folder [x]" in terminal.getvalue()


def test_a_log_has_a_line_of_each_task_now_and_then_and_one_at_its_end(log: io.StringIO, clock: Clock) -> None:
    with progress_display() as shown:
        work(shown, clock)
        during = log.getvalue().splitlines()
    assert during == [
        "extract: 240 of 1,000 samples, 40.0 samples/s, 0:00:19 left, 2 workers",
        "extract: 300 of 1,000 samples, 2.0 samples/s, 0:05:50 left, 2 workers",
    ]
    assert log.getvalue().splitlines()[2:] == [
        "extract: 1,000 of 1,000 samples, 8.8 samples/s, took 0:01:31, 2 workers"
    ]


def work(shown: Progress, clock: Clock) -> None:
    """1,000 samples, of which 200 are there, in 91 seconds."""
    task = shown.task("extract", 1000)
    shown.task("node-1", 256, detail=True).update(done=3)
    task.update(done=200, note="2 workers")
    clock.now += 1
    task.advance(10)
    clock.now += 30
    task.update(done=240, rate=40.0)
    clock.now += 30
    task.update(done=300, rate=0.0)
    clock.now += 30
    task.update(done=1000)


def test_a_complete_task_has_its_last_line_before_the_next_begins(log: io.StringIO, clock: Clock) -> None:
    with progress_display() as shown:
        for name in ("pack", "verify"):
            task = shown.task(name, unit="shards")
            clock.now += 2
            task.update(done=4, total=8)
            clock.now += 2
            task.update(done=8)
            shown.message(f"note after {name}")
    assert log.getvalue().splitlines() == [
        "note after pack",
        "pack: 8 of 8 shards, 2.0 shards/s, took 0:00:04",
        "note after verify",
        "verify: 8 of 8 shards, 2.0 shards/s, took 0:00:04",
    ]


def test_a_log_says_how_far_work_was_that_failed_and_nothing_of_what_did_not_begin(
    log: io.StringIO, clock: Clock
) -> None:
    def fail() -> None:
        with progress_display() as shown:
            task = shown.task("convert", unit="MB")
            shown.task("never")
            clock.now += 2
            task.advance(0.5)
            raise UserError("no")

    with pytest.raises(UserError):
        fail()
    assert log.getvalue() == "convert: 0.5 MB, 0.2 MB/s, took 0:00:02\n"


def test_the_time_between_two_lines_can_be_set(log: io.StringIO, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOG_EVERY_VARIABLE, "0")
    with progress_display() as shown:
        task = shown.task("pack", 4)
        for _ in range(4):
            clock.now += 1
            task.advance()
    assert len(log.getvalue().splitlines()) == 4
    monkeypatch.setenv(LOG_EVERY_VARIABLE, "often")
    with pytest.raises(UserError, match=re.escape(f"{LOG_EVERY_VARIABLE} is 'often'")), progress_display():
        pass


def test_all_processes_of_a_group_but_the_first_are_silent(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "is_main_process", False)
    with progress_display() as shown:
        assert shown is SILENT
        shown.task("pack", 1).advance()
        shown.message("note")
    assert log.getvalue() == ""
