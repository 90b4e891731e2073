"""Running tasks on a Ray cluster: long-lived actors, as many as the cluster has room for, and their progress.

The only file that imports ray. It knows nothing of what a task is.
"""

import contextlib
import logging
import os
import re
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from pipeline.task_pool import FailedTry, TaskPool
from storage.errors import UserError

logger = logging.getLogger(__name__)

Work = Callable[[int, Callable[[int], None]], Any]
"""A worker's work on one task: gets the task's number and a function to report progress with.

If it has a method `timings`, that says in seconds, since it was made, what its time went into."""

POLL_S = 0.2
REPORT_S = 0.5
SCALE_S = 5.0
RESTART_PAUSE_S = 30.0
COMPLAINT_S = 60.0
RATE_WINDOW_S = 20.0
CONNECT_TIMEOUT_S = 10.0
FAILURES_OF_A_SICK_WORKER = 3
"""In a row; then its process is replaced: a GPU in a bad state fails every task that comes after."""


@dataclass(frozen=True)
class Cluster:
    """What a connected cluster has."""

    cpus: int
    gpus: int


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


@contextlib.contextmanager
def connect(address: str | None, num_cpus: int | None = None) -> Iterator[Cluster]:
    """Connects to a cluster, or starts one on this machine for the time of the block.

    Args:
        address: of a running cluster ("auto", "host:6379", "ray://host:10001"); None starts a local one.
        num_cpus: slots of a local cluster; None is the number of cores.
    """
    started = not ray.is_initialized()
    if started:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address is None:
            options |= {"num_cpus": num_cpus, "include_dashboard": False, "address": "local"}
        else:
            _check_reachable(address)
            options["address"] = address
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"no Ray cluster at {address}: {error}; check --ray-address") from error
    try:
        resources = ray.cluster_resources()
        yield Cluster(cpus=int(resources.get("CPU", 1)), gpus=int(resources.get("GPU", 0)))
    finally:
        if started:
            ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes where nothing listens."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"no Ray cluster at {address}: {error}; check --ray-address") from error


def run_tasks(
    make_worker: Callable[[], Work],
    tasks: list[int],
    *,
    num_workers: int | None,
    gpus_per_worker: float,
    max_attempts: int,
    on_progress: Callable[[int, int], None],
    on_result: Callable[[int, Any], None],
    on_workers: Callable[[list[Worker]], None] | None = None,
    tasks_per_worker: int = 1,
) -> Outcome:
    """Runs every task on some worker, a failed one again, until it is done or out of attempts.

    Workers follow the cluster: nodes that join get theirs, those of lost nodes are replaced where there is room.
    What a failure costs a task is said in `task_pool`.

    Args:
        make_worker: called once in each actor; what it returns does the work. A `UserError` from it ends the run,
            unless another worker was ready before.
        tasks: task numbers, started in this order.
        num_workers: actors at most; those the cluster has no room for wait for it to grow. None is one a GPU (or
            CPU, when `gpus_per_worker` is 0) that the cluster has at the time.
        gpus_per_worker: GPUs an actor holds.
        max_attempts: tries of one task, crashes and exceptions counted alike; also how many workers in a row may
            fail to start, while none works, before the run is given up.
        on_progress: called with (task, units of work) as workers report them; with a negative number when an
            attempt failed, so that the sum over a task is what its successful attempt reported.
        on_result: called with (task, result) as tasks finish.
        on_workers: called with the workers that there are, a few times a second.
        tasks_per_worker: tasks an actor has in flight; with more than one, its work is called from as many threads,
            so that it can read and write for one task while it computes for another.
    """
    # Without a slot of its own: on a cluster whose every core holds a worker it would wait for ever. On the head
    # node: that one is not lost while the cluster lives.
    mailbox = ray.remote(num_cpus=0, resources={"node:__internal_head__": 0.001})(_Mailbox).remote()
    actor_class = ray.remote(num_cpus=1, num_gpus=gpus_per_worker, max_restarts=0, max_concurrency=tasks_per_worker)(
        _Actor
    )
    pool = TaskPool(tasks, max_attempts, tasks_per_worker)
    crew = _Crew(
        pool,
        lambda: actor_class.remote(make_worker, mailbox),
        lambda: num_workers or _slots(gpus_per_worker),
        on_progress,
        on_result,
    )
    polled = 0.0
    try:
        while pool.num_unfinished:
            crew.scale()
            for reference in _finished(list(crew.running)):
                crew.finish(reference)
            if (now := time.monotonic()) > polled + POLL_S:
                polled = now
                with contextlib.suppress(RayError):
                    # What a lost letter said comes again with the task's result.
                    crew.progress(ray.get(mailbox.take.remote()))
                if on_workers is not None:
                    on_workers(crew.workers)
        if on_workers is not None:
            on_workers(crew.workers)
    finally:
        crew.close()
        ray.kill(mailbox)
    return Outcome(pool.given_up, pool.tries, crew.ever_ready, dict(crew.failed_starts))


def _slots(gpus_per_worker: float) -> int:
    """Workers that the cluster has room for as it is now."""
    resources = ray.cluster_resources()
    if gpus_per_worker:
        return int(resources.get("GPU", 0) / gpus_per_worker)
    return int(resources.get("CPU", 0))


def _finished(references: list[Any]) -> list[Any]:
    """Those that are finished, after waiting a moment for the first one."""
    if not references:
        time.sleep(POLL_S)
        return []
    done, _ = ray.wait(references, timeout=POLL_S)
    if done:
        done, _ = ray.wait(references, num_returns=len(references), timeout=0)
    return list(done)


class _Mailbox:
    """Where actors drop what they have to report, until the driver takes it."""

    def __init__(self) -> None:
        self._letters: list[tuple[int, int, int]] = []

    def put(self, task: int, number: int, amount: int) -> None:
        self._letters.append((task, number, amount))

    def take(self) -> list[tuple[int, int, int]]:
        letters, self._letters = self._letters, []
        return letters


class _Actor:
    """Holds one worker for its lifetime, so that what it loaded is loaded once."""

    def __init__(self, make_worker: Callable[[], Work], mailbox: Any) -> None:
        self._make_worker = make_worker
        self._mailbox = mailbox

    def start(self) -> tuple[str, int]:
        """Makes the worker; says on which machine and in which process."""
        # Not in the constructor: of an exception there ray keeps the text only.
        self._work = self._make_worker()
        return socket.gethostname(), os.getpid()

    def run(self, task: int, number: int) -> tuple[Any, int, dict[str, float]]:
        """The result, the units of work it was, and what the worker's time went into."""
        report = _Report(task, number, self._mailbox)
        result = self._work(task, report)
        timings: dict[str, float] = getattr(self._work, "timings", dict)()
        return result, report.total, timings


class _Report:
    """Adds up what one try of a task reports, and sends it now and then."""

    def __init__(self, task: int, number: int, mailbox: Any) -> None:
        self._task, self._number, self._mailbox = task, number, mailbox
        self._lock = threading.Lock()
        self.total = self._sent = 0
        self._sent_at = 0.0

    def __call__(self, amount: int) -> None:
        with self._lock:
            self.total += amount
            if (now := time.monotonic()) > self._sent_at + REPORT_S:
                self._mailbox.put.remote(self._task, self._number, self.total - self._sent)
                self._sent, self._sent_at = self.total, now


class _Crew:
    """The workers of a run, and their pending calls.

    Not ray.util.ActorPool: that one ends without an error when its last actor dies with work left.
    """

    def __init__(
        self,
        pool: TaskPool,
        new_actor: Callable[[], Any],
        num_slots: Callable[[], int],
        on_progress: Callable[[int, int], None],
        on_result: Callable[[int, Any], None],
    ) -> None:
        self._pool, self._new_actor, self._num_slots = pool, new_actor, num_slots
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
        count = min(self._num_slots() - len(self.workers), num_idle_tasks)
        if count <= 0 and not self.workers and now > self._next_complaint:
            self._next_complaint = now + COMPLAINT_S
            logger.warning("%d tasks wait for a node that has room for a worker", self._pool.num_waiting)
        if self._failed_starts >= self._pool.max_attempts:
            # Something is wrong where workers start; the ones that work go on.
            count = min(count, 1 - num_starting)
        for _ in range(count):
            worker = Worker(self._new_actor())
            self.workers.append(worker)
            self.running[worker.actor.start.remote()] = (worker, None, 0)

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
            worker.node, worker.pid = ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, UserError) and not self.ever_ready:
                # It would be the same in every other worker.
                raise error.cause from None
            address, pid = _place(error)
            # The text that ray makes of an exception is a page; that of a `UserError` may have several lines.
            why = str(error.cause) if isinstance(error.cause, UserError) else _last_line(error)
            self._failed_start(worker, f"{why} (on {address}, process {pid})", f"{why} (on {address})")
        except RayError as error:
            why = f"its process died: {_cause_of_death(error)}"
            self._failed_start(worker, why, why)
        else:
            self._failed_starts = 0
            worker.ready_at = time.monotonic()
            self.ever_ready.append(worker)
            self._give(worker)

    def _ended(self, worker: Worker, task: int, number: int, reference: Any) -> str | None:
        """Takes the result or the exception of one task; of what the worker died, if it did."""
        try:
            result, total, timings = ray.get(reference)
        except RayTaskError as error:
            self._take_back(worker, task, number)
            worker.failures_in_a_row += 1
            self._pool.failed(task, worker.node, worker.pid, _last_line(error))
        except RayError as error:
            return _cause_of_death(error)
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
            self.running[worker.actor.run.remote(task, self._num_tries)] = (worker, task, self._num_tries)
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
        for number in [number for number, holder in self._holders.items() if holder is worker]:
            del self._holders[number]
        for task in tasks:
            self._uncount(worker, task)
        why = f"its worker process died: {why}"
        self._pool.worker_died(tasks, worker.node, worker.pid, why)
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
        ray.kill(worker.actor)


def _cause_of_death(error: RayError) -> str:
    """The sentence of ray's page of text that says what happened."""
    if isinstance(error, OutOfMemoryError):
        return f"killed, as its machine ran out of memory: {str(error).strip().splitlines()[0]}"
    _, found, detail = str(error).partition("Worker exit detail: ")
    return detail.splitlines()[0].split(" Some common causes")[0] if found else _last_line(error)


def _place(error: RayTaskError) -> tuple[str, str]:
    """Address and process; the exception of the worker's own type, which ray raises, knows them as text only."""
    found = re.search(r"\(pid=(\d+), ip=([^,)]+)", str(error))
    return (found[2], found[1]) if found else ("?", "?")


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
