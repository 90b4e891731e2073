"""Runs tasks on a Ray cluster: long-lived actors, as many as the cluster has room for, and their progress.

It knows nothing of what a task is.
"""

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from pipeline.cluster.actor_pool import ActorPool, WorkerLost, WorkRaised
from pipeline.cluster.connection import ClusterWatch, gpus_of_nodes, lost
from pipeline.cluster.mailbox import Mailbox
from pipeline.cluster.task_queue import TaskQueue
from pipeline.cluster.watchdog import end_when_stuck
from pipeline.cluster.worker import Outcome, Work, Worker
from pipeline.ui.streams import guard_streams
from storage.errors import UserError
from storage.safe_path import check_code, code_digest, keep_children_safe

POLL_S = 0.2
REPORT_S = 0.5


@dataclass(frozen=True)
class TaskLimits:
    """How many workers there are, what each holds, and how often a task is tried."""

    num_workers: int | None
    """Actors at most; those the cluster has no room for wait for it to grow. None is as many as the GPUs of each
    node give (or CPUs, when `gpus_per_worker` is 0) that the cluster has at the time."""
    gpus_per_worker: int
    """GPUs an actor holds, all of one node."""
    max_attempts: int
    """Tries of one task, crashes and exceptions counted alike; also how many workers in a row may fail to start, while
    none works, before the run is given up."""
    tasks_per_worker: int = 1
    """Tasks an actor has in flight; with more than one, its work is called from as many threads, so that it can read
    and write for one task while it computes for another."""
    cpus_per_worker: int = 1
    """Cores an actor takes."""


def run_tasks(
    make_worker: Callable[[], Work],
    tasks: list[int],
    limits: TaskLimits,
    *,
    on_progress: Callable[[int, int], None],
    on_result: Callable[[int, Any], None],
    on_workers: Callable[[list[Worker]], None] = lambda _: None,
) -> Outcome:
    """Runs every task on some worker until it is done or out of attempts; `task_queue` says what a failure costs.

    Workers follow the cluster: nodes that join get theirs, those of lost nodes are replaced where there is room.

    Args:
        make_worker: called once in each actor; what it returns does the work. A `UserError` from it ends the run,
            unless another worker was ready before.
        tasks: task numbers, started in this order.
        limits: of workers and attempts.
        on_progress: called with (task, units of work) as workers report them; with a negative number when an
            attempt failed, so that the sum over a task is what its successful attempt reported.
        on_result: called with (task, result) as tasks finish.
        on_workers: called with the workers that there are, a few times a second.
    """
    executor = _RayExecutor(make_worker, limits)
    queue = TaskQueue(tasks, limits.max_attempts, limits.tasks_per_worker)
    pool = ActorPool(queue, executor, on_progress, on_result)
    watch = ClusterWatch()
    polled = 0.0
    try:
        while queue.num_unfinished:
            if watch.just_answered():
                pool.scale()
            for call in _finished(pool.calls):
                pool.finish(call)
            if (now := time.monotonic()) > polled + POLL_S:
                polled = now
                # What a lost report said comes again with the task's result.
                with contextlib.suppress(RayError):
                    pool.progress(executor.reports())
                on_workers(pool.workers)
        on_workers(pool.workers)
    except ConnectionError as error:  # of a client
        raise lost(str(error)) from error
    finally:
        pool.close()
        executor.close()
    return Outcome(queue.given_up, queue.tries, pool.ever_ready, dict(pool.failed_starts))


class _RayExecutor:
    """`actor_pool.Executor` on the connected cluster, and the mailbox of its actors."""

    def __init__(self, make_worker: Callable[[], Work], limits: TaskLimits) -> None:
        self._make_worker, self._limits = make_worker, limits
        self._mailbox = new_mailbox()
        self._actor_class = ray.remote(
            num_cpus=limits.cpus_per_worker,
            num_gpus=limits.gpus_per_worker,
            max_restarts=0,
            max_concurrency=limits.tasks_per_worker,
        )(_Actor)

    def new_actor(self) -> Any:
        return self._actor_class.remote(self._make_worker, self._mailbox, code_digest())

    def start(self, actor: Any) -> Any:
        return actor.start.remote()

    def run(self, actor: Any, task: int, attempt: int, crashes: tuple[int, ...] | None) -> Any:
        return actor.run.remote(task, attempt, crashes)

    def position(self, attempt: int) -> int | None:
        position: int | None = None
        with contextlib.suppress(RayError):
            position = ray.get(self._mailbox.position.remote(attempt))
        return position

    def result(self, call: Any) -> Any:
        try:
            return ray.get(call)
        except RayTaskError as error:
            node, pid = _origin(error)
            # The text that ray makes of an exception is a page; that of a `UserError` may have several lines.
            why = str(error.cause) if isinstance(error.cause, UserError) else _last_line(error)
            raise WorkRaised(why, node, pid, error.cause) from None
        except RayError as error:
            raise WorkerLost(_cause_of_death(error)) from None

    def end(self, actor: Any) -> None:
        ray.kill(actor)

    def num_slots(self) -> int:
        if self._limits.num_workers:
            return self._limits.num_workers
        if self._limits.gpus_per_worker:
            return sum(gpus // self._limits.gpus_per_worker for gpus in gpus_of_nodes())
        return int(ray.cluster_resources().get("CPU", 0)) // self._limits.cpus_per_worker

    def reports(self) -> list[tuple[int, int]]:
        """What attempts reported since the last call: number of the attempt, units of work."""
        return list(ray.get(self._mailbox.take.remote()))

    def close(self) -> None:
        """Ends the mailbox."""
        ray.kill(self._mailbox)


def _finished(calls: list[Any]) -> list[Any]:
    """Calls that are finished, after waiting a moment for the first one."""
    if not calls:
        time.sleep(POLL_S)
    elif ray.wait(calls, timeout=POLL_S)[0]:
        return list(ray.wait(calls, num_returns=len(calls), timeout=0)[0])
    return []


def new_mailbox() -> Any:
    """Makes the actor through which processes and driver talk.

    It has no slot of its own: on a cluster whose every core holds a worker it would wait for ever. It is on the head
    node, which is not lost while the cluster lives.
    """
    return ray.remote(num_cpus=0, resources={"node:__internal_head__": 0.001})(Mailbox).remote()


class _Actor:
    """Holds one worker for its lifetime, so that what it loaded is loaded once."""

    def __init__(self, make_worker: Callable[[], Work], mailbox: Any, code: str) -> None:
        self._make_worker, self._mailbox, self._code = make_worker, mailbox, code

    def start(self) -> tuple[str, int]:
        """Makes the worker; says on which machine and in which process."""
        guard_streams()
        # Not in the constructor: of an exception there ray keeps the text only.
        keep_children_safe()
        end_when_stuck()
        check_code(self._code)
        self._work = self._make_worker()
        return socket.gethostname(), os.getpid()

    def run(self, task: int, attempt: int, crashes: tuple[int, ...] | None) -> tuple[Any, int, dict[str, float]]:
        """Gives the result, the units of work it was, and what the worker's time went into."""
        report = _Report(attempt, crashes or (), self._mailbox)
        run_isolated = getattr(self._work, "run_isolated", None)
        if crashes is None or run_isolated is None:
            result = self._work(task, report)
        else:
            result = run_isolated(task, report, report)
        return result, report.total, getattr(self._work, "timings", dict)()


class _Report:
    """Adds up what one attempt reports, and sends it now and then.

    Also its `ProgressMarker`: positions are kept in the mailbox, on the head node, whatever becomes of this one.
    """

    def __init__(self, attempt: int, crashes: tuple[int, ...], mailbox: Any) -> None:
        self._attempt, self.crashes, self._mailbox = attempt, crashes, mailbox
        self._lock = threading.Lock()
        self.total = self._sent = 0
        self._sent_at = 0.0

    def mark(self, position: int) -> None:
        # Waits for the answer: the process may die at the next instruction.
        ray.get(self._mailbox.mark.remote(self._attempt, position))

    def __call__(self, amount: int) -> None:
        with self._lock:
            self.total += amount
            if (now := time.monotonic()) > self._sent_at + REPORT_S:
                self._mailbox.put.remote(self._attempt, self.total - self._sent)
                self._sent, self._sent_at = self.total, now


def _cause_of_death(error: RayError) -> str:
    """The sentence of ray's page of text that says what happened."""
    if isinstance(error, OutOfMemoryError):
        return f"killed, as its machine ran out of memory: {str(error).strip().splitlines()[0]}"
    _, found, detail = str(error).partition("Worker exit detail: ")
    return detail.splitlines()[0].split(" Some common causes")[0] if found else _last_line(error)


def _origin(error: RayTaskError) -> tuple[str, str]:
    """Address and process; the exception of the worker's own type, which ray raises, knows them as text only."""
    found = re.search(r"\(pid=(\d+), ip=([^,)]+)", str(error))
    return (found[2], found[1]) if found else ("?", "?")


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
