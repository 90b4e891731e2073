import os
import re
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError, RayTaskError

from pipeline.cluster import ray_backend
from pipeline.cluster.actor_pool import ActorPool
from pipeline.cluster.connection import connect
from pipeline.cluster.ray_backend import TaskLimits, run_tasks
from pipeline.cluster.task_queue import TaskQueue
from pipeline.cluster.worker import Outcome, Worker
from storage.errors import FingerprintMismatch, UserError
from tests.processes import wait_until_dead

pytestmark = pytest.mark.usefixtures("ray_address")

Report = Callable[[int], None]


@dataclass
class Ran:
    """What a run gave: results, and the order in which they came; progress reports."""

    outcome: Outcome
    results: dict[int, Any]
    reports: list[tuple[int, int]]

    @property
    def failures(self) -> dict[int, str]:
        return self.outcome.failures

    def reported(self, task: int) -> int:
        return sum(amount for number, amount in self.reports if number == task)


def run(
    make_worker: Callable[[], Any], tasks: list[int], workers: int | None = 1, attempts: int = 3, **overrides: Any
) -> Ran:
    reports: list[tuple[int, int]] = []
    results: dict[int, Any] = {}
    limits = TaskLimits(workers, 0, attempts, overrides.pop("tasks_per_worker", 1))
    listeners: dict[str, Any] = {
        "on_progress": lambda task, amount: reports.append((task, amount)),
        "on_result": results.__setitem__,
    }
    return Ran(run_tasks(make_worker, tasks, limits, **(listeners | overrides)), results, reports)


class Recorder:
    """Squares the task; notes each attempt as a file, and fails the way the test asks for."""

    def __init__(self, folder: Path, fail: dict[int, str]) -> None:
        self.folder, self.fail = folder, fail
        (folder / f"worker-{os.getpid()}").touch()

    def __call__(self, task: int, report: Report) -> int:
        attempt = len(list(self.folder.glob(f"task-{task}-*")))
        (self.folder / f"task-{task}-{attempt}").touch()
        report(1)
        way = self.fail.get(task, "")
        if way == "raise" or (way == "raise once" and attempt == 0):
            raise RuntimeError(f"task {task} is bad")
        if way == "die" or (way == "die once" and attempt == 0):
            os.kill(os.getpid(), signal.SIGKILL)
        if way == "exit":
            os._exit(1)
        if way == "hang":
            time.sleep(600)
        report(1)
        return task * task

    def timings(self) -> dict[str, float]:
        return {"waiting": 1.5}


def attempts_of(folder: Path, task: int) -> int:
    return len(list(folder.glob(f"task-{task}-*")))


def worker_pids(folder: Path) -> list[int]:
    return [int(path.name.split("-")[1]) for path in folder.glob("worker-*")]


def test_one_worker_does_the_tasks_in_their_order_and_is_made_once(tmp_path: Path) -> None:
    ran = run(partial(Recorder, tmp_path, {}), [3, 1, 2])
    assert list(ran.results.items()) == [(3, 9), (1, 1), (2, 4)]
    assert ran.failures == {}
    assert len(worker_pids(tmp_path)) == 1
    assert [ran.reported(task) for task in (1, 2, 3)] == [2, 2, 2]
    (worker,) = ran.outcome.workers
    assert [worker.pid] == worker_pids(tmp_path)
    assert (worker.num_tasks, worker.num_units, worker.num_failures, worker.attempts) == (3, 6, 0, [])
    assert worker.timings == {"waiting": 1.5}
    assert all(wait_until_dead(pid) for pid in worker_pids(tmp_path))


def test_no_tasks_need_no_worker(tmp_path: Path) -> None:
    ran = run(partial(Recorder, tmp_path, {}), [])
    assert (ran.results, ran.failures, ran.reports) == ({}, {}, [])
    assert worker_pids(tmp_path) == []


WHY = {
    "raise": "RuntimeError: task 1 is bad",
    "die": "its worker process died: Worker unexpectedly exits",
    "exit": "its worker process died: Worker unexpectedly exits",
}


@pytest.mark.parametrize("way", ["raise", "die", pytest.param("exit", marks=pytest.mark.slow)])
def test_a_task_that_always_fails_is_tried_max_attempts_times_and_the_rest_finishes(way: str, tmp_path: Path) -> None:
    ran = run(partial(Recorder, tmp_path, {1: way}), [0, 1, 2, 3], workers=2, attempts=2)
    assert ran.results == {0: 0, 2: 4, 3: 9}
    assert attempts_of(tmp_path, 1) == 2
    assert WHY[way] in ran.failures[1]
    assert "after 2 attempts" in ran.failures[1]
    assert ran.reported(1) == 0
    tries = ran.outcome.tries
    assert tries.keys() == {1}
    assert all(WHY[way] in failed.why and failed.node == socket.gethostname() and failed.counts for failed in tries[1])
    assert {failed.pid for failed in tries[1]} <= set(worker_pids(tmp_path))


@pytest.mark.parametrize("way", ["raise once", "die once"])
def test_a_task_that_fails_once_is_done_at_the_second_attempt_and_counted_once(way: str, tmp_path: Path) -> None:
    ran = run(partial(Recorder, tmp_path, {0: way}), [0, 1], workers=1)
    assert list(ran.results.items()) == [(1, 1), (0, 0)]
    assert attempts_of(tmp_path, 0) == 2
    assert (ran.reported(0), ran.reported(1)) == (2, 2)
    assert len(ran.outcome.tries[0]) == 1


def refuse(error: Exception) -> Any:
    raise error


@pytest.mark.parametrize(
    "error", [UserError("no such teacher: one\ntwo"), FingerprintMismatch("another teacher (differs in: dtype)")]
)
def test_a_user_error_of_a_starting_worker_ends_the_run_with_its_whole_message(error: UserError) -> None:
    with pytest.raises(type(error)) as caught:
        run(partial(refuse, error), [0, 1, 2], workers=2)
    assert str(caught.value) == str(error)


def test_a_user_error_of_a_worker_that_joins_late_ends_nothing_and_is_reported_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused = UserError("another teacher: one\ntwo")

    def get(_: object) -> Any:
        raise RayTaskError("start", f"\x1b[36mray::_Actor.start()\x1b[39m (pid=7, ip=10.0.0.9)\n{refused}", refused)

    monkeypatch.setattr(ray_backend.ray, "get", get)
    actor_pool = ActorPool(TaskQueue([0, 1], 1, 1), LateExecutor(), lambda *_: None, lambda *_: None)
    # One works already, and has the first task.
    actor_pool.ever_ready.append(Worker(None, ready_at=0.0))
    actor_pool.workers.append(actor_pool.ever_ready[0])
    actor_pool.scale()
    actor_pool.finish("start of the late one")
    assert actor_pool.failed_starts == {"another teacher: one\ntwo (on 10.0.0.9)": 1}
    assert actor_pool.workers == actor_pool.ever_ready


class LateExecutor(ray_backend._RayExecutor):
    """Of an actor whose start ends in an error."""

    def __init__(self) -> None:
        self._limits = TaskLimits(2, 0, 1)

    def new_actor(self) -> str:
        return "the late one"

    def start(self, actor: Any) -> str:
        return f"start of {actor}"

    def end(self, actor: Any) -> None:
        assert actor == "the late one"


def note_and_die(folder: Path) -> Any:
    (folder / f"start-{os.getpid()}").touch()
    os.kill(os.getpid(), signal.SIGKILL)


def note_and_raise(folder: Path) -> Any:
    (folder / f"start-{time.time_ns()}").touch()
    raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (note_and_raise, r"RuntimeError: out of memory \(on [0-9.]+, process [0-9]+\)"),
        (note_and_die, "Worker unexpectedly exits"),
    ],
)
def test_workers_that_cannot_start_are_tried_a_bounded_number_of_times(
    make: Callable[[Path], Any], why: str, tmp_path: Path
) -> None:
    ran = run(partial(make, tmp_path), list(range(50)), workers=1, attempts=2)
    assert len(list(tmp_path.glob("start-*"))) == 2
    assert ran.results == {}
    assert ran.failures.keys() == set(range(50))
    assert re.search(why, ran.failures[49])
    assert "no worker could start" in ran.failures[49]


def test_an_interruption_leaves_no_worker_behind(tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(partial(Recorder, tmp_path, {0: "hang"}), [0, 1, 2], workers=2, on_result=interrupt)
    pids = worker_pids(tmp_path)
    assert pids
    assert all(wait_until_dead(pid) for pid in pids)


class Meeting:
    """Notes how many tasks are in the worker at once; a task in `deadly` kills it once another one is there too."""

    def __init__(self, folder: Path, deadly: set[int]) -> None:
        self.folder, self.deadly, self.inside = folder, deadly, set[int]()

    def __call__(self, task: int, report: Report) -> list[int]:
        self.inside.add(task)
        attempt = attempts_of(self.folder, task)
        (self.folder / f"task-{task}-{attempt}").touch()
        report(1)
        deadline = time.monotonic() + (5 if attempt == 0 else 0.3)
        while len(self.inside) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        met = sorted(self.inside)
        if task in self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)
        self.inside.remove(task)
        report(1)
        return met


def test_a_worker_has_as_many_tasks_in_flight_as_asked_and_each_is_done_once(tmp_path: Path) -> None:
    ran = run(partial(Meeting, tmp_path, set()), [0, 1, 2, 3], tasks_per_worker=2)
    assert ran.failures == {}
    assert ran.results.keys() == {0, 1, 2, 3}
    assert [len(met) for met in ran.results.values()] == [2, 2, 2, 2]
    assert [attempts_of(tmp_path, task) for task in range(4)] == [1, 1, 1, 1]
    assert [ran.reported(task) for task in range(4)] == [2, 2, 2, 2]


def test_a_task_that_kills_its_worker_costs_its_neighbours_no_attempt_and_all_are_retried_alone(tmp_path: Path) -> None:
    # One attempt: a neighbour that was charged for the death would be given up.
    ran = run(partial(Meeting, tmp_path, {1}), [0, 1, 2, 3], attempts=1, tasks_per_worker=2)
    assert ran.failures.keys() == {1}
    assert "its worker process died" in ran.failures[1]
    assert "after 1 attempts" in ran.failures[1]
    assert attempts_of(tmp_path, 1) == 2
    assert [failed.counts for failed in ran.outcome.tries[1]] == [False, True]
    assert ran.results.keys() == {0, 2, 3}
    assert ran.results[0] == [0], "met another task in its second try"
    assert [ran.reported(task) for task in range(4)] == [2, 0, 2, 2]


def say_pid(task: int, report: Report) -> int:
    time.sleep(0.3)
    return os.getpid()


class WaitsForAnother:
    """Says its process number, once as many workers are ready as the folder is to have files."""

    def __init__(self, folder: Path, num_workers: int) -> None:
        self.folder, self.num_workers = folder, num_workers
        (folder / str(os.getpid())).touch()

    def __call__(self, task: int, report: Report) -> int:
        deadline = time.monotonic() + 60
        while len(list(self.folder.iterdir())) < self.num_workers and time.monotonic() < deadline:
            time.sleep(0.05)
        # The driver, too, must have seen that the other one is ready.
        time.sleep(1)
        return os.getpid()


def test_workers_share_few_tasks_rather_than_the_first_one_taking_them_all(tmp_path: Path) -> None:
    ran = run(partial(WaitsForAnother, tmp_path, 2), [0, 1], workers=2, tasks_per_worker=2)
    assert len(set(ran.results.values())) == 2


def test_without_a_number_of_workers_there_is_one_for_each_slot_of_the_cluster() -> None:
    seen: list[int] = []
    ran = run(lambda: say_pid, list(range(6)), workers=None, on_workers=lambda workers: seen.append(len(workers)))
    assert len(set(ran.results.values())) == len(ran.outcome.workers) == 2
    assert max(seen) == 2
    assert all(worker.seconds > 0 and worker.ended == "no task was left for it" for worker in ran.outcome.workers)


def test_a_worker_whose_tasks_fail_in_a_row_is_replaced_by_a_fresh_process(tmp_path: Path) -> None:
    ran = run(partial(Sick, tmp_path), [0, 1, 2, 3], attempts=2)
    assert ran.failures == {}
    assert ran.results == {0: 1, 1: 1, 2: 1, 3: 1}
    assert [worker.num_failures for worker in ran.outcome.workers] == [3, 0]
    assert ran.outcome.workers[0].ended == "its tasks failed in a row"


class Sick:
    """The first process fails everything, like one whose GPU is in a bad state; says how many were before it."""

    def __init__(self, folder: Path) -> None:
        self.number = len(list(folder.iterdir()))
        (folder / str(self.number)).touch()

    def __call__(self, task: int, report: Report) -> int:
        if not self.number:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return self.number


def test_a_worker_killed_for_memory_is_reported_in_one_sentence() -> None:
    page = "1 worker(s) were killed due to the node running low on memory.\nRefer to the documentation on how to ..."
    said = ray_backend._cause_of_death(OutOfMemoryError(page))
    assert said.endswith("ran out of memory: 1 worker(s) were killed due to the node running low on memory.")


def test_connecting_inside_a_connected_process_uses_its_cluster_and_leaves_it_running() -> None:
    import ray

    with connect(None) as cluster:
        assert (cluster.cpus, cluster.gpus) == (2, 0)
    assert ray.is_initialized()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999"])
def test_an_address_where_nothing_listens_is_one_message_at_once(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(UserError, match=f"no Ray cluster at {address}: .*; check --ray-address"), connect(address):
        pass
