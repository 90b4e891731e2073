"""What is known of the workers of a run, and of what became of its tasks. Knows no executor."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.cluster.task_queue import FailedTry

Work = Callable[[int, Callable[[int], None]], Any]
"""A worker's work on one task: gets the task's number and a function to report progress with.

If it has a method `timings`, that says in seconds, since it was made, what its time went into. If it has a method
`carefully`, the last of several attempts calls that with a `ProgressMarker` as third argument: the task is alone in the
process then, and what fails in it may be found and left out."""

RATE_WINDOW_S = 20.0


class ProgressMarker(Protocol):
    """What a careful try tells of itself, and is told of those before it."""

    @property
    def deaths(self) -> tuple[int, ...]:
        """Places at which earlier careful tries died, in order."""

    def at(self, place: int) -> None:
        """Says where in the task the try is now; outlives the process and its machine once this returns."""


class ProcessUnfit(Exception):
    """Raised by work whose process is of no use any more; it is replaced, and the try counts as a death."""


@dataclass(eq=False)
class Worker:
    """An actor: where it is, what it has in flight, what it has done."""

    actor: Any
    node: str = "?"
    pid: int = 0
    ready_at: float | None = None
    """Clock time (`time.monotonic`) at which it could take its first task."""
    in_flight: dict[int, int] = field(default_factory=dict)
    """Task -> units it reported so far."""
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
