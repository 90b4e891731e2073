"""The workers of a run and their pending calls: who gets which task, and what an end of either costs.

Knows no executor: `Executor` is all that it asks of one.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from pipeline.cluster.task_queue import TaskQueue
from pipeline.cluster.worker import ProcessUnfit, Worker
from storage.errors import UserError

logger = logging.getLogger(__name__)

SCALE_S = 5.0
RESTART_PAUSE_S = 30.0
COMPLAINT_S = 60.0
FAILURES_OF_A_SICK_WORKER = 3
"""In a row; then its process is replaced: a GPU in a bad state fails every task that comes after."""


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
        """An actor whose process may not run yet."""

    def start(self, actor: Any) -> Any:
        """The pending call that makes its worker; gives machine and process."""

    def run(self, actor: Any, task: int, number: int, deaths: tuple[int, ...] | None) -> Any:
        """The pending call of one try; gives the result, the units of work it was, and the worker's timings.

        Args:
            actor: who runs it.
            task: the task.
            number: of the try.
            deaths: places at which careful tries of the task died before; None unless this is a careful one.
        """

    def place(self, number: int) -> int | None:
        """Where a try said it was; None when it said nothing."""

    def result(self, call: Any) -> Any:
        """What a finished call gave.

        Raises:
            WorkRaised: it ended with an exception.
            WorkerLost: its process died.
        """

    def end(self, actor: Any) -> None:
        """Ends its process, whatever it does."""

    def num_slots(self) -> int:
        """Workers that there should be, as the cluster is now."""


class ActorPool:
    """The workers of a run, and their pending calls.

    Not ray.util.ActorPool: that one ends without an error when its last actor dies with work left.
    """

    def __init__(
        self,
        pool: TaskQueue,
        calls: Executor,
        on_progress: Callable[[int, int], None],
        on_result: Callable[[int, Any], None],
    ) -> None:
        self._pool, self._calls = pool, calls
        self._on_progress, self._on_result = on_progress, on_result
        self._failed_starts = 0
        self.failed_starts: Counter[str] = Counter()
        """Why workers did not start, and where."""
        self._next_scale = self._next_complaint = 0.0
        self._num_tries = 0
        self._holders: dict[int, Worker] = {}
        """Number of a try in flight -> its worker."""
        self.workers: list[Worker] = []
        self.ever_ready: list[Worker] = []
        self.running: dict[Any, tuple[Worker, int | None, int]] = {}
        """What each pending call is: the worker, its task (None while it starts), and the number of the try."""

    def scale(self) -> None:
        """Starts as many workers as there is room and work for; looks at the cluster now and then."""
        now = time.monotonic()
        if now < self._next_scale:
            return
        self._next_scale = now + SCALE_S
        num_starting = self._num_starting()
        num_idle_tasks = self._pool.num_waiting - num_starting
        if num_idle_tasks <= 0:
            return
        count = min(self._calls.num_slots() - len(self.workers), num_idle_tasks)
        if count <= 0 and not self.workers and now > self._next_complaint:
            self._next_complaint = now + COMPLAINT_S
            logger.warning("%d tasks wait for a node that has room for a worker", self._pool.num_waiting)
        if self._failed_starts >= self._pool.max_attempts:
            # Something is wrong where workers start; the ones that work go on.
            count = min(count, 1 - num_starting)
        for _ in range(count):
            worker = Worker(self._calls.new_actor())
            self.workers.append(worker)
            self.running[self._calls.start(worker.actor)] = (worker, None, 0)

    def finish(self, reference: Any) -> None:
        """Takes a result, or puts the task back when its worker died or raised."""
        if reference not in self.running:
            # Its worker died with another one.
            return
        worker, task, number = self.running.pop(reference)
        if task is None:
            self._started(worker, reference)
        elif why_dead := self._ended(worker, task, number, reference):
            self._died(worker, why_dead)
        else:
            self._give(worker)

    def progress(self, letters: list[tuple[int, int, int]]) -> None:
        """Passes on what workers reported, but for tries that ended meanwhile."""
        for task, number, amount in letters:
            if (worker := self._holders.get(number)) is not None:
                self._count(worker, task, amount)
        now = time.monotonic()
        for worker in self.workers:
            worker.note_rate(now)

    def close(self) -> None:
        """Ends the workers that still run, so that no work goes on unseen."""
        for worker in list(self.workers):
            self._remove(worker, "the run ended")

    def _started(self, worker: Worker, reference: Any) -> None:
        try:
            worker.node, worker.pid = self._calls.result(reference)
        except WorkRaised as error:
            if isinstance(error.cause, UserError) and not self.ever_ready:
                # It would be the same in every other worker.
                raise error.cause from None
            self._failed_start(worker, f"{error} (on {error.node}, process {error.pid})", f"{error} (on {error.node})")
        except WorkerLost as error:
            why = f"its process died: {error}"
            self._failed_start(worker, why, why)
        else:
            self._failed_starts = 0
            worker.ready_at = time.monotonic()
            self.ever_ready.append(worker)
            self._give(worker)

    def _ended(self, worker: Worker, task: int, number: int, reference: Any) -> str | None:
        """Takes the result or the exception of one task; of what the worker died, if it did."""
        try:
            result, total, timings = self._calls.result(reference)
        except WorkRaised as error:
            if isinstance(error.cause, ProcessUnfit):
                return str(error)
            self._take_back(worker, task, number)
            if not isinstance(error.cause, UserError):
                # A full disk is as full for a fresh process.
                worker.failures_in_a_row += 1
            self._pool.failed(task, worker.node, worker.pid, str(error))
        except WorkerLost as error:
            return str(error)
        else:
            self._count(worker, task, total - worker.in_flight[task])
            del self._holders[number], worker.in_flight[task]
            worker.num_tasks += 1
            worker.failures_in_a_row = 0
            worker.timings = timings
            self._pool.done(task)
            self._on_result(task, result)
        return None

    def _give(self, worker: Worker) -> None:
        """Fills the worker up; one for which there is nothing to do is ended."""
        sick = worker.failures_in_a_row >= FAILURES_OF_A_SICK_WORKER
        while not sick and (task := self._pool.next_for(worker.in_flight, self._num_starting())) is not None:
            self._num_tries += 1
            worker.in_flight[task] = 0
            self._holders[self._num_tries] = worker
            deaths = self._pool.deaths(task) if self._pool.is_last(task) else None
            call = self._calls.run(worker.actor, task, self._num_tries, deaths)
            self.running[call] = (worker, task, self._num_tries)
        if not worker.in_flight:
            self._remove(worker, "its tasks failed in a row" if sick else "no task was left for it")
            if sick:
                self._next_scale = 0.0

    def _died(self, worker: Worker, why: str) -> None:
        """Puts all tasks of a dead worker back."""
        # A result that came before the death counts; the others end with the same error.
        for reference in [reference for reference, (other, *_) in self.running.items() if other is worker]:
            _, task, number = self.running.pop(reference)
            assert task is not None
            self._ended(worker, task, number, reference)
        tasks = sorted(worker.in_flight)
        numbers = [number for number, holder in self._holders.items() if holder is worker]
        for number in numbers:
            del self._holders[number]
        for task in tasks:
            self._uncount(worker, task)
        why = f"its worker process died: {why}"
        place = self._calls.place(numbers[0]) if len(numbers) == 1 else None
        self._pool.worker_died(tasks, worker.node, worker.pid, why, place)
        self._remove(worker, why)
        self._next_scale = 0.0

    def _take_back(self, worker: Worker, task: int, number: int) -> None:
        del self._holders[number]
        self._uncount(worker, task)

    def _uncount(self, worker: Worker, task: int) -> None:
        """What is done again must not be counted twice."""
        worker.num_failures += 1
        self._count(worker, task, -worker.in_flight[task])
        del worker.in_flight[task]

    def _count(self, worker: Worker, task: int, amount: int) -> None:
        if amount:
            worker.in_flight[task] += amount
            worker.num_units += amount
            self._on_progress(task, amount)

    def _failed_start(self, worker: Worker, why: str, kind: str) -> None:
        """Bounded, so that a cluster where no worker can start is not tried for ever; `kind` is alike in each try."""
        self._remove(worker, why)
        self._failed_starts += 1
        self.failed_starts[kind] += 1
        logger.warning("a worker could not start: %s", why)
        if self._failed_starts < self._pool.max_attempts:
            self._next_scale = 0.0
        elif self.workers:
            self._next_scale = time.monotonic() + RESTART_PAUSE_S
        else:
            self._pool.give_up_waiting(f"no worker could start: {why} (after {self._failed_starts} attempts)")

    def _num_starting(self) -> int:
        return sum(worker.ready_at is None for worker in self.workers)

    def _remove(self, worker: Worker, why: str) -> None:
        self.workers.remove(worker)
        worker.ended = why
        if worker.ready_at is not None:
            worker.seconds = time.monotonic() - worker.ready_at
        self._calls.end(worker.actor)
