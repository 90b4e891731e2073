"""Decides which task is run next, and what a failure costs it. Knows no executor.

When a worker dies, all its tasks go back. If it had several, the death counts against none of them, since any one may
have caused it; each is a suspect from then on and runs alone, where a death counts. So a task has at most one try more
than `max_attempts`, and no task is given up for what its neighbour did.

The last attempt of several is isolated: it runs alone in its worker and may mark its position in the task. If the
worker crashes then, the next try is told the position. Such a crash is no attempt as long as it may teach something.
"""

import logging
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

CRASHES_AT_A_POSITION = 2
"""Isolated tries that crash at one position; after that many the position is to blame, and to be left out."""
MAX_MARKED_CRASHES = 16
"""Crashes of one task at known positions; then it is given up."""


@dataclass(frozen=True)
class FailedTry:
    """One try of a task that came to nothing."""

    node: str
    """Machine it ran on."""
    pid: int
    """Process it ran in."""
    why: str
    """The error, or what the process died of."""
    counts: bool
    """Whether it is one of the task's attempts; a death beside other tasks, or a crash at a marked position, is not."""
    position: int | None = None
    """Where in the task an isolated try was when its worker crashed, as it marked."""


@dataclass
class TaskQueue:
    """Tasks that wait for a worker, tries that failed, tasks given up."""

    tasks: Iterable[int]
    """Task numbers, given out in this order."""
    max_attempts: int
    """Failed attempts after which a task is given up."""
    tasks_per_worker: int
    """Tasks a worker may have in flight."""
    tries: dict[int, list[FailedTry]] = field(default_factory=dict)
    """Failed tries of each task that had any."""
    given_up: dict[int, str] = field(default_factory=dict)
    """Tasks out of attempts, with their last error."""

    def __post_init__(self) -> None:
        self._waiting = deque(self.tasks)
        self._waiting_suspects: deque[int] = deque()
        self._suspects: set[int] = set()
        self._num_in_flight = 0

    @property
    def num_waiting(self) -> int:
        """Tasks that no worker has."""
        return len(self._waiting) + len(self._waiting_suspects)

    @property
    def num_unfinished(self) -> int:
        """Tasks neither done nor given up."""
        return self.num_waiting + self._num_in_flight

    def next_for(self, in_flight: Iterable[int], num_others_free: int = 0) -> int | None:
        """The task to add to a worker's, None when there is none for it now.

        Args:
            in_flight: tasks the worker has.
            num_others_free: workers without a task, as those that are starting: work is left for them rather than
                heaped on one.
        """
        holds = list(in_flight)
        if len(holds) >= self.tasks_per_worker or not self._suspects.isdisjoint(holds):
            return None
        queue = self._waiting if holds else self._waiting or self._waiting_suspects
        if len(queue) <= (num_others_free if holds else 0):
            return None
        self._num_in_flight += 1
        return queue.popleft()

    def is_last(self, task: int) -> bool:
        """Whether the next try is the last of several attempts, and so is isolated."""
        return self.max_attempts > 1 and self._num_attempts(task) >= self.max_attempts - 1

    def crashes(self, task: int) -> tuple[int, ...]:
        """Positions at which workers crashed in isolated tries of the task, in order."""
        return tuple(failed.position for failed in self.tries.get(task, ()) if failed.position is not None)

    def done(self, task: int) -> None:
        """Notes that the task succeeded."""
        self._num_in_flight -= 1

    def failed(self, task: int, node: str, pid: int, why: str, position: int | None = None) -> None:
        """Notes that the task raised, or that its worker died while it was alone there, at that position if known."""
        self._num_in_flight -= 1
        is_lesson = position is not None and self._may_crash_at(task, position)
        self.tries.setdefault(task, []).append(FailedTry(node, pid, why, counts=not is_lesson, position=position))
        num_attempts = self._num_attempts(task)
        if num_attempts < self.max_attempts:
            logger.warning("task %d failed on %s, process %d (%s); trying again", task, node, pid, why)
            if self.is_last(task):
                self._suspects.add(task)
            # At the end of the line: the tasks behind it must not wait for one that may never succeed.
            (self._waiting_suspects if task in self._suspects else self._waiting).append(task)
        else:
            logger.warning("task %d failed on %s, process %d (%s); given up", task, node, pid, why)
            self.given_up[task] = f"{why} (after {num_attempts} attempts)"

    def worker_died(self, tasks: Sequence[int], node: str, pid: int, why: str, position: int | None = None) -> None:
        """Puts the tasks of a dead worker back; `position` is where an isolated try was."""
        if len(tasks) == 1:
            self.failed(tasks[0], node, pid, why, position)
            return
        for task in tasks:
            self._num_in_flight -= 1
            self.tries.setdefault(task, []).append(FailedTry(node, pid, why, counts=False))
            logger.warning("task %d was not alone in process %d on %s (%s); trying it alone", task, pid, node, why)
            self._waiting_suspects.append(task)
            self._suspects.add(task)

    def _num_attempts(self, task: int) -> int:
        return sum(failed.counts for failed in self.tries.get(task, ()))

    def _may_crash_at(self, task: int, position: int) -> bool:
        """Whether one crash more there is a lesson to the next try; bounded, as is all that a task may cost."""
        crashes = Counter(self.crashes(task))
        return crashes[position] < CRASHES_AT_A_POSITION and crashes.total() < MAX_MARKED_CRASHES

    def give_up_waiting(self, why: str) -> None:
        """Gives up all tasks that still wait."""
        self.given_up |= dict.fromkeys([*self._waiting, *self._waiting_suspects], why)
        self._waiting.clear()
        self._waiting_suspects.clear()
