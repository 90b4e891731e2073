"""Running tasks on a Ray cluster: long-lived actors, one task at a time each, retries, live progress.

The only file that imports ray. It knows nothing of what a task is.
"""

import contextlib
import logging
import queue
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.queue import Queue

from storage.errors import UserError

logger = logging.getLogger(__name__)

Work = Callable[[int, Callable[[int], None]], Any]
"""A worker's work on one task: gets the task's number and a function to report progress with."""

POLL_S = 0.2


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
        max_attempts: tries of one task, crashes and exceptions counted alike.
        on_progress: called with (task, units of work) as workers report them.
        on_result: called with (task, result) as tasks finish.
    """
    reports = Queue()
    actor_class = ray.remote(num_cpus=1, num_gpus=gpus_per_worker, max_restarts=0)(_Actor)
    pool = _Pool(lambda: actor_class.remote(make_worker, reports), tasks, max_attempts)
    try:
        for _ in range(min(num_workers, len(tasks))):
            pool.start_next()
        while pool.running:
            done, _ = ray.wait(list(pool.running), timeout=POLL_S)
            _drain(reports, on_progress)
            for reference in done:
                pool.finish(reference, on_result)
        _drain(reports, on_progress)
    finally:
        pool.close()
        reports.shutdown(force=True)
    return pool.outcome


class _Actor:
    """Holds one worker for its lifetime, so that what it loaded is loaded once."""

    def __init__(self, make_worker: Callable[[], Work], reports: Queue) -> None:
        self._work = make_worker()
        self._reports = reports

    def run(self, task: int) -> Any:
        return self._work(task, lambda amount: self._reports.put((task, amount)))


class _Pool:
    """Actors and what each is working on.

    Not ray.util.ActorPool: that one ends without an error when its last actor dies with work left.
    """

    def __init__(self, new_actor: Callable[[], Any], tasks: list[int], max_attempts: int) -> None:
        self._new_actor = new_actor
        self._waiting = deque(tasks)
        self._attempts: dict[int, int] = {}
        self._max_attempts = max_attempts
        self.running: dict[Any, tuple[Any, int]] = {}
        self.outcome = Outcome()

    def start_next(self, actor: Any = None) -> None:
        """Gives the next waiting task to `actor`, or to a new one."""
        if not self._waiting:
            if actor is not None:
                ray.kill(actor)
            return
        actor = actor if actor is not None else self._new_actor()
        task = self._waiting.popleft()
        self._attempts[task] = self._attempts.get(task, 0) + 1
        self.running[actor.run.remote(task)] = (actor, task)

    def finish(self, reference: Any, on_result: Callable[[int, Any], None]) -> None:
        """Takes a result, or puts the task back when its actor died or raised."""
        actor, task = self.running.pop(reference)
        try:
            result = ray.get(reference)
        except RayActorError as error:
            _raise_user_error(error)
            self._failed(task, f"its worker died: {_last_line(error)}")
            self.start_next()
        except RayTaskError as error:
            self._failed(task, _last_line(error))
            self.start_next(actor)
        else:
            self.outcome.results[task] = result
            on_result(task, result)
            self.start_next(actor)

    def _failed(self, task: int, why: str) -> None:
        if self._attempts[task] < self._max_attempts:
            logger.warning("task %d failed (%s); trying again", task, why)
            # At the end of the line: the tasks behind it must not wait for one that may never succeed.
            self._waiting.append(task)
        else:
            self.outcome.failures[task] = f"{why} (after {self._attempts[task]} attempts)"

    def close(self) -> None:
        """Ends the actors that still run, so that no work goes on unseen."""
        for actor, _ in self.running.values():
            ray.kill(actor)


def _drain(reports: Queue, on_progress: Callable[[int, int], None]) -> None:
    with contextlib.suppress(queue.Empty, RayActorError):
        for task, amount in reports.get_nowait_batch(min(reports.qsize(), 1000)):
            on_progress(task, amount)


def _raise_user_error(error: RayActorError) -> None:
    """An actor that could not start for a user's mistake would fail the same way each time."""
    cause = getattr(error, "cause", None) or error.__cause__
    if isinstance(cause, UserError):
        raise cause
    text = str(error)
    for line in text.splitlines():
        if "storage.errors." in line and ": " in line:
            raise UserError(line.split(": ", 1)[1])


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
