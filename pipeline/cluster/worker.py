"""The workers of a run, their attempts at tasks, and the outcome of all. Knows no executor."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.cluster.task_queue import FailedTry

Work = Callable[[int, Callable[[int], None]], Any]
"""A worker's work on one task: gets the task's number and a function to report progress with.

If it has a method `timings`, that says in seconds, since it was made, what its time went into. If it has a method
`run_isolated`, the last of several attempts calls that with a `ProgressMarker` as third argument: the task is alone in
the process then, so the work can find what fails in it and leave that out."""

RATE_WINDOW_S = 20.0


class ProgressMarker(Protocol):
    """Where an isolated try says how far it is, and learns where earlier ones crashed."""

    @property
    def crashes(self) -> tuple[int, ...]:
        """Positions at which earlier isolated tries crashed, in order."""

    def mark(self, position: int) -> None:
        """Keeps the position that the try has reached; once this returns, it outlives the process and its machine."""


class ProcessUnfit(Exception):
    """Raised by work whose process is of no use any more; it is replaced, and the try counts as a crash."""


@dataclass(eq=False)
class Worker:
    """An actor: where it is, what it is at, what it has done."""

    actor: Any
    node: str = "?"
    pid: int = 0
    ready_at: float | None = None
    """Clock time (`time.monotonic`) at which it could take its first task."""
    attempts: "list[Attempt]" = field(default_factory=list)
    """Those in flight, the oldest first."""
    num_tasks: int = 0
    """Tasks done."""
    num_units: int = 0
    """Units of work of the tasks done and in flight."""
    num_failures: int = 0
    timings: dict[str, float] = field(default_factory=dict)
    """What its time went into, in seconds, as it says itself."""
    ended: str = ""
    """Why it is no more; empty while it runs."""
    seconds: float = 0.0
    """From ready to its end."""
    failures_in_a_row: int = 0
    _recent: deque[tuple[float, int]] = field(default_factory=deque)

    @property
    def rate(self) -> float:
        """Units a second over the last seconds."""
        if len(self._recent) < 2:
            return 0.0
        (first, before), (last, after) = self._recent[0], self._recent[-1]
        return max(after - before, 0) / max(last - first, 1e-9)

    def note_rate(self, now: float) -> None:
        """Remembers how far it is; called now and then."""
        self._recent.append((now, self.num_units))
        while self._recent[0][0] < now - RATE_WINDOW_S:
            self._recent.popleft()


@dataclass(eq=False)
class Attempt:
    """One try of a task in a worker, while it is in flight."""

    number: int
    """No other try of the run has it."""
    task: int
    worker: Worker
    num_units: int = 0
    """Units of work that it reported so far."""


@dataclass
class Outcome:
    """What became of the tasks."""

    failures: dict[int, str] = field(default_factory=dict)
    """Tasks given up after their last attempt, with the last error."""
    tries: dict[int, list[FailedTry]] = field(default_factory=dict)
    """Failed tries of each task that had any, whether it succeeded in the end or not."""
    workers: list[Worker] = field(default_factory=list)
    """All workers that ever were ready."""
    failed_starts: dict[str, int] = field(default_factory=dict)
    """Why workers did not start, and where -> how many times."""
