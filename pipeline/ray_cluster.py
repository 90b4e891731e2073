"""Running tasks on a Ray cluster: long-lived actors, one task at a time each, retries, live progress.

The only file that imports ray. It knows nothing of what a task is.
"""

import contextlib
import logging
import queue
import socket
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.queue import Queue

from storage.errors import UserError

logger = logging.getLogger(__name__)

Work = Callable[[int, Callable[[int], None]], Any]
"""A worker's work on one task: gets the task's number and a function to report progress with."""

POLL_S = 0.2
CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Cluster:
    """What a connected cluster has."""

    cpus: int
    gpus: int


@dataclass
class Outcome:
    """What became of the tasks."""

    results: dict[int, Any] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    """Tasks given up after their last attempt, with the last error."""


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
    num_workers: int,
    gpus_per_worker: float,
    max_attempts: int,
    on_progress: Callable[[int, int], None],
    on_result: Callable[[int, Any], None],
) -> Outcome:
    """Runs every task on some worker, a failed one again on another, until it is done or out of attempts.

    Args:
        make_worker: called once in each actor; what it returns does the work. A `UserError` from it ends the run.
        tasks: task numbers, started in this order.
        num_workers: actors; those the cluster has no room for wait for it to grow.
        gpus_per_worker: GPUs an actor holds.
        max_attempts: tries of one task, crashes and exceptions counted alike; also how many workers in a row may
            fail to start before no more are started.
        on_progress: called with (task, units of work) as workers report them; with a negative number when an
            attempt failed, so that the sum over a task is what its successful attempt reported.
        on_result: called with (task, result) as tasks finish.
    """
    # Without a slot of its own: on a cluster whose every core holds a worker it would wait for ever.
    reports = Queue(actor_options={"num_cpus": 0})
    actor_class = ray.remote(num_cpus=1, num_gpus=gpus_per_worker, max_restarts=0)(_Actor)
    pool = _Pool(lambda: actor_class.remote(make_worker, reports), tasks, max_attempts, on_progress, on_result)
    try:
        for _ in range(min(num_workers, len(tasks))):
            pool.start_worker()
        while pool.running:
            done, _ = ray.wait(list(pool.running), timeout=POLL_S)
            _drain(reports, pool.progress)
            for reference in done:
                pool.finish(reference)
    finally:
        pool.close()
        reports.shutdown(force=True)
    return pool.outcome


class _Actor:
    """Holds one worker for its lifetime, so that what it loaded is loaded once."""

    def __init__(self, make_worker: Callable[[], Work], reports: Queue) -> None:
        self._make_worker = make_worker
        self._reports = reports

    def start(self) -> None:
        # Not in the constructor: of an exception there ray keeps the text only.
        self._work = self._make_worker()

    def run(self, task: int, attempt: int) -> Any:
        return self._work(task, lambda amount: self._reports.put((task, attempt, amount)))


class _Pool:
    """Actors and what each is working on.

    Not ray.util.ActorPool: that one ends without an error when its last actor dies with work left.
    """

    def __init__(
        self,
        new_actor: Callable[[], Any],
        tasks: list[int],
        max_attempts: int,
        on_progress: Callable[[int, int], None],
        on_result: Callable[[int, Any], None],
    ) -> None:
        self._new_actor = new_actor
        self._waiting = deque(tasks)
        self._attempts: dict[int, int] = {}
        self._reported: dict[int, int] = {}
        self._failed_starts = 0
        self._max_attempts = max_attempts
        self._on_progress, self._on_result = on_progress, on_result
        self._actors: list[Any] = []
        self.running: dict[Any, tuple[Any, int | None]] = {}
        """What each pending call is: the actor, and its task, or None while it starts."""
        self.outcome = Outcome()

    def start_worker(self) -> None:
        """Starts an actor; it gets its first task when it is ready."""
        actor = self._new_actor()
        self._actors.append(actor)
        self.running[actor.start.remote()] = (actor, None)

    def finish(self, reference: Any) -> None:
        """Takes a result, or puts the task back when its actor died or raised."""
        actor, task = self.running.pop(reference)
        try:
            result = ray.get(reference)
        except RayTaskError as error:
            if task is not None:
                self._failed(task, _last_line(error))
                self._give(actor)
            elif isinstance(error.cause, UserError):
                # It would be the same in every other worker.
                raise error.cause from None
            else:
                self._failed_start(actor, _last_line(error))
        except RayError as error:
            if task is not None:
                self._failed(task, f"its worker process died: {_cause_of_death(error)}")
                self._remove(actor)
                self._replace()
            else:
                self._failed_start(actor, f"its process died: {_cause_of_death(error)}")
        else:
            if task is None:
                self._failed_starts = 0
            else:
                self.outcome.results[task] = result
                self._on_result(task, result)
            self._give(actor)

    def progress(self, task: int, attempt: int, amount: int) -> None:
        """Passes on what a worker reported, unless that attempt was given up meanwhile."""
        if attempt == self._attempts[task] and task not in self.outcome.failures and task not in self._waiting:
            self._reported[task] = self._reported.get(task, 0) + amount
            self._on_progress(task, amount)

    def close(self) -> None:
        """Ends the actors that still run, so that no work goes on unseen."""
        for actor in list(self._actors):
            self._remove(actor)

    def _give(self, actor: Any) -> None:
        if not self._waiting:
            self._remove(actor)
            return
        task = self._waiting.popleft()
        self._attempts[task] = self._attempts.get(task, 0) + 1
        self.running[actor.run.remote(task, self._attempts[task])] = (actor, task)

    def _failed(self, task: int, why: str) -> None:
        # What is done again must not be counted twice.
        if reported := self._reported.pop(task, 0):
            self._on_progress(task, -reported)
        if self._attempts[task] < self._max_attempts:
            logger.warning("task %d failed (%s); trying again", task, why)
            # At the end of the line: the tasks behind it must not wait for one that may never succeed.
            self._waiting.append(task)
        else:
            self.outcome.failures[task] = f"{why} (after {self._attempts[task]} attempts)"

    def _failed_start(self, actor: Any, why: str) -> None:
        """Bounded, so that a cluster where no worker can start is not tried for ever."""
        self._remove(actor)
        self._failed_starts += 1
        if self._failed_starts < self._max_attempts:
            logger.warning("a worker could not start (%s); starting another", why)
            self._replace()
        elif not self.running:
            while self._waiting:
                task = self._waiting.popleft()
                self.outcome.failures[task] = f"no worker could start: {why} (after {self._failed_starts} attempts)"

    def _replace(self) -> None:
        if self._waiting:
            self.start_worker()

    def _remove(self, actor: Any) -> None:
        self._actors.remove(actor)
        ray.kill(actor)


def _drain(reports: Queue, on_report: Callable[[int, int, int], None]) -> None:
    with contextlib.suppress(queue.Empty, RayActorError):
        while waiting := reports.qsize():
            for task, attempt, amount in reports.get_nowait_batch(waiting):
                on_report(task, attempt, amount)


def _cause_of_death(error: RayError) -> str:
    """The sentence of ray's page of text that says what happened."""
    _, found, detail = str(error).partition("Worker exit detail: ")
    return detail.splitlines()[0].split(" Some common causes")[0] if found else _last_line(error)


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
