import io

import pytest
from rich.console import Console

from pipeline.extraction import WorkerLine
from pipeline.ui import progress
from pipeline.ui.progress import WORKER_LINES, ExtractionBar, bars


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    return shown_on(monkeypatch, force_terminal=True)


def shown_on(monkeypatch: pytest.MonkeyPatch, force_terminal: bool) -> io.StringIO:
    text = io.StringIO()
    console = Console(file=text, force_terminal=force_terminal, width=160, height=40, no_color=True)
    monkeypatch.setattr(progress, "console", console)
    return text


def line(number: int, rate: float = 2.0, shards: tuple[int, ...] = (7,)) -> WorkerLine:
    return WorkerLine(f"node-{number} 1{number:02d}", rate, shards, done_samples=3, total_samples=256)


def last_state(text: io.StringIO) -> list[str]:
    """The lines of the last full redraw."""
    lines = [
        part for part in text.getvalue().replace("\x1b[2K", "").split("\n") if "extract" in part or "node-" in part
    ]
    first = max(number for number, shown in enumerate(lines) if "extract" in shown)
    return [shown.strip() for shown in lines[first:]]


def test_a_terminal_shows_the_whole_and_each_worker_at_work(terminal: io.StringIO) -> None:
    with bars() as shown:
        bar = ExtractionBar(shown)
        bar.start(1000, 200)
        bar.advance(40)
        bar.shard_done(5_000_000)
        bar.workers([line(1, 2.0), line(2, 3.5, (8, 9))])
    whole, first, second = last_state(terminal)
    assert "240/1000" in whole
    assert "5.5 samples/s" in whole
    assert "2 workers, 1 shards, 5.0 MB" in whole
    assert first.startswith("node-1 101")
    assert "2.0 samples/s" in first
    assert "shard 7" in first
    assert "3.5 samples/s" in second
    assert "shard 8, 9" in second


def test_only_so_many_workers_have_a_line_and_one_that_ends_makes_room(terminal: io.StringIO) -> None:
    workers = [line(number) for number in range(WORKER_LINES + 3)]
    with bars() as shown:
        bar = ExtractionBar(shown)
        bar.start(1000, 0)
        bar.workers(workers)
        bar.workers(workers[2:])
    whole, *lines = last_state(terminal)
    assert "1 workers are not shown" in whole
    assert [shown.split()[0] for shown in lines] == [f"node-{number}" for number in range(2, WORKER_LINES + 2)]


def test_without_a_terminal_there_is_a_plain_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown_on(monkeypatch, force_terminal=False)
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0)
    with bars() as shown:
        bar = ExtractionBar(shown)
        bar.start(1000, 0)
        bar.advance(100)
        bar.workers([line(1, 10.0)])
        during = text.getvalue()
    assert during == "extract: 100 of 1,000 samples, 10.0 samples/s, 1 workers, 0 shards, 0.0 MB, 0:01:30 left\n"
