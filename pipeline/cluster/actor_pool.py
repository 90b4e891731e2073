"""The workers of a run and their attempts: who gets which task, and what happens when one of them fails.

Knows no executor: `Executor` is all that it asks of one.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from pipeline.cluster.task_queue import TaskQueue
from pipeline.cluster.worker import Attempt, ProcessUnfit, Worker
from storage.errors import UserError

logger = logging.getLogger(__name__)

SCALE_S = 5.0
RESTART_PAUSE_S = 30.0
WARN_EVERY_S = 60.0
FAILURES_IN_A_ROW = 3
"""After that many a worker's process is replaced: a GPU in a bad state fails every task that comes after."""


class WorkRaised(Exception):
    """A call ended with an exception; its process lives on."""

    def __init__(self, why: str, node: str, pid: str, cause: BaseException | None) -> None:
        super().__init__(why)
        self.node, self.pid, self.cause = node, pid, cause


class WorkerLost(Exception):
    """A call ended because its process is no more; the text says what happened to it."""


class Executor(Protocol):
    """How actors are made, called and ended. A pending call is a value that can be a key."""

    def new_actor(self) -> Any:
        """Makes an actor; its process need not run yet."""

    def start(self, actor: Any) -> Any:
        """Gives the pending call that makes the actor's worker; its result is machine and process."""

    def run(self, actor: Any, task: int, attempt: int, crashes: tuple[int, ...] | None) -> Any:
        """Gives the pending call of one attempt; its result is the work's, its units, and the worker's timings.

        `crashes` are positions at which isolated tries of the task crashed; None unless this try is isolated.
        """

    def position(self, attempt: int) -> int | None:
        """Says where an attempt said it was; None when it said nothing."""

    def result(self, call: Any) -> Any:
        """Gives the result of a finished call.

        Raises:
            WorkRaised: If it ended with an exception.
            WorkerLost: If its process died.
        """

    def end(self, actor: Any) -> None:
        """Ends the actor's process, whatever it does."""

    def num_slots(self) -> int:
        """Says how many workers there should be, as the cluster is now."""


class ActorPool:
    """The workers of a run, and their pending calls.

    Not ray.util.ActorPool: that one ends without an error when its last actor dies with work left.
    """

    def __init__(
        self,
        queue: TaskQueue,
        executor: Executor,
        on_progress: Callable[[int, int], None],
        on_result: Callable[[int, Any], None],
    ) -> None:
        self._queue, self._executor = queue, executor
        self._on_progress, self._on_result = on_progress, on_result
        self._num_failed_starts = 0
        self.failed_starts: Counter[str] = Counter()
        """Why workers did not start, and where."""
        self._next_scale = self._next_warning = 0.0
        self._num_attempts = 0
        self.workers: list[Worker] = []
        self.ever_ready: list[Worker] = []
        self._starting: dict[Any, Worker] = {}
        """Pending call -> the worker that it makes."""
        self._running: dict[Any, Attempt] = {}
        """Pending call -> the attempt that it is; the worker's `attempts` hold the same."""

    @property
    def calls(self) -> list[Any]:
        """All pending calls."""
        return [*self._starting, *self._running]

    def scale(self) -> None:
        """Starts as many workers as there is room and work for; looks at the cluster now and then."""
        now = time.monotonic()
        if now < self._next_scale:
            return
        self._next_scale = now + SCALE_S
        num_idle_tasks = self._queue.num_waiting - len(self._starting)
        if num_idle_tasks <= 0:
            return
        count = min(self._executor.num_slots() - len(self.workers), num_idle_tasks)
        if count <= 0 and not self.workers and now > self._next_warning:
            self._next_warning = now + WARN_EVERY_S
            logger.warning("%d tasks wait for a node that has room for a worker", self._queue.num_waiting)
        if self._num_failed_starts >= self._queue.max_attempts:
            # Something is wrong where workers start; those that work go on.
            count = min(count, 1 - len(self._starting))
        for _ in range(count):
            worker = Worker(self._executor.new_actor())
            self.workers.append(worker)
            self._starting[self._executor.start(worker.actor)] = worker

    def finish(self, call: Any) -> None:
        """Takes the result of a finished call, or puts the task back when its worker died or raised."""
        if (worker := self._starting.pop(call, None)) is not None:
            self._started(worker, call)
        elif (attempt := self._running.pop(call, None)) is not None:
            if why_dead := self._ended(attempt, call):
                self._died(attempt.worker, why_dead)
            else:
                self._give(attempt.worker)
        # Else its worker died with another call.

    def progress(self, reports: list[tuple[int, int]]) -> None:
        """Passes on what attempts reported (number, units), but for those that ended meanwhile."""
        by_number = {attempt.number: attempt for attempt in self._running.values()}
        for number, amount in reports:
            if (attempt := by_number.get(number)) is not None:
                self._count(attempt, amount)
        now = time.monotonic()
        for worker in self.workers:
            worker.note_rate(now)

    def close(self) -> None:
        """Ends the workers that still run, so that no work goes on unseen."""
        for worker in list(self.workers):
            self._remove(worker, "the run ended")

    def _started(self, worker: Worker, call: Any) -> None:
        try:
            worker.node, worker.pid = self._executor.result(call)
        except WorkRaised as error:
            if isinstance(error.cause, UserError) and not self.ever_ready:
                # It would be the same in every other worker.
                raise error.cause from None
            self._failed_start(worker, f"{error} (on {error.node}, process {error.pid})", f"{error} (on {error.node})")
        except WorkerLost as error:
            why = f"its process died: {error}"
            self._failed_start(worker, why, why)
        else:
            self._num_failed_starts = 0
            worker.ready_at = time.monotonic()
            self.ever_ready.append(worker)
            self._give(worker)

    def _ended(self, attempt: Attempt, call: Any) -> str | None:
        """Takes the result or the exception of one attempt; says what the worker died of, if it did."""
        worker = attempt.worker
        try:
            result, num_units, timings = self._executor.result(call)
        except WorkRaised as error:
            if isinstance(error.cause, ProcessUnfit):
                return str(error)
            self._take_back(attempt)
            if not isinstance(error.cause, UserError):
                # A full disk is as full for a fresh process.
                worker.failures_in_a_row += 1
            self._queue.failed(attempt.task, worker.node, worker.pid, str(error))
        except WorkerLost as error:
            return str(error)
        else:
            self._count(attempt, num_units - attempt.num_units)
            worker.attempts.remove(attempt)
            worker.num_tasks += 1
            worker.failures_in_a_row = 0
            worker.timings = timings
            self._queue.done(attempt.task)
            self._on_result(attempt.task, result)
        return None

    def _give(self, worker: Worker) -> None:
        """Fills the worker up; one for which there is nothing to do is ended."""
        is_sick = worker.failures_in_a_row >= FAILURES_IN_A_ROW
        while not is_sick:
            task = self._queue.next_for((attempt.task for attempt in worker.attempts), len(self._starting))
            if task is None:
                break
            self._num_attempts += 1
            attempt = Attempt(self._num_attempts, task, worker)
            worker.attempts.append(attempt)
            crashes = self._queue.crashes(task) if self._queue.is_last(task) else None
            self._running[self._executor.run(worker.actor, task, attempt.number, crashes)] = attempt
        if not worker.attempts:
            self._remove(worker, "its tasks failed in a row" if is_sick else "no task was left for it")
            if is_sick:
                self._next_scale = 0.0

    def _died(self, worker: Worker, why: str) -> None:
        """Puts all tasks of a dead worker back."""
        # A result that came before the death counts; the other calls end with the same error.
        for call, attempt in [(call, other) for call, other in self._running.items() if other.worker is worker]:
            del self._running[call]
            self._ended(attempt, call)
        lost = sorted(worker.attempts, key=lambda attempt: attempt.task)
        for attempt in lost:
            self._take_back(attempt)
        why = f"its worker process died: {why}"
        position = self._executor.position(lost[0].number) if len(lost) == 1 else None
        self._queue.worker_died([attempt.task for attempt in lost], worker.node, worker.pid, why, position)
        self._remove(worker, why)
        self._next_scale = 0.0

    def _take_back(self, attempt: Attempt) -> None:
        """What is done again must not be counted twice."""
        attempt.worker.num_failures += 1
        self._count(attempt, -attempt.num_units)
        attempt.worker.attempts.remove(attempt)

    def _count(self, attempt: Attempt, amount: int) -> None:
        if amount:
            attempt.num_units += amount
            attempt.worker.num_units += amount
            self._on_progress(attempt.task, amount)

    def _failed_start(self, worker: Worker, why: str, kind: str) -> None:
        """Bounded, so that a cluster where no worker can start is not tried for ever; `kind` is alike in each try."""
        self._remove(worker, why)
        self._num_failed_starts += 1
        self.failed_starts[kind] += 1
        logger.warning("a worker could not start: %s", why)
        if self._num_failed_starts < self._queue.max_attempts:
            self._next_scale = 0.0
        elif self.workers:
            self._next_scale = time.monotonic() + RESTART_PAUSE_S
        else:
            self._queue.give_up_waiting(f"no worker could start: {why} (after {self._num_failed_starts} attempts)")

    def _remove(self, worker: Worker, why: str) -> None:
        self.workers.remove(worker)
        worker.ended = why
        if worker.ready_at is not None:
            worker.seconds = time.monotonic() - worker.ready_at
        self._executor.end(worker.actor)
