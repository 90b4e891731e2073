import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.ray_cluster import Outcome, connect, run_tasks
from storage.errors import FingerprintMismatch, UserError
from tests.pipeline.processes import wait_until_dead

pytestmark = pytest.mark.usefixtures("ray_address")

Report = Callable[[int], None]


def run(
    make_worker: Callable[[], Any], tasks: list[int], workers: int = 1, attempts: int = 3, **overrides: Any
) -> tuple[Outcome, list[tuple[int, int]], list[int]]:
    """Outcome, progress reports, and tasks in the order their results came."""
    reports: list[tuple[int, int]] = []
    order: list[int] = []
    settings: dict[str, Any] = {
        "num_workers": workers,
        "gpus_per_worker": 0,
        "max_attempts": attempts,
        "on_progress": lambda task, amount: reports.append((task, amount)),
        "on_result": lambda task, _: order.append(task),
    }
    return run_tasks(make_worker, tasks, **(settings | overrides)), reports, order


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
        if way == "hang":
            time.sleep(600)
        report(1)
        return task * task


def attempts_of(folder: Path, task: int) -> int:
    return len(list(folder.glob(f"task-{task}-*")))


def worker_pids(folder: Path) -> list[int]:
    return [int(path.name.split("-")[1]) for path in folder.glob("worker-*")]


def test_one_worker_does_the_tasks_in_their_order_and_is_made_once(tmp_path: Path) -> None:
    outcome, reports, order = run(partial(Recorder, tmp_path, {}), [3, 1, 2])
    assert order == [3, 1, 2]
    assert outcome.results == {3: 9, 1: 1, 2: 4}
    assert outcome.failures == {}
    assert len(worker_pids(tmp_path)) == 1
    assert {task: sum(n for t, n in reports if t == task) for task in (1, 2, 3)} == {1: 2, 2: 2, 3: 2}
    assert all(wait_until_dead(pid) for pid in worker_pids(tmp_path))


def test_no_tasks_need_no_worker(tmp_path: Path) -> None:
    outcome, reports, order = run(partial(Recorder, tmp_path, {}), [])
    assert (outcome.results, outcome.failures, reports, order) == ({}, {}, [], [])
    assert worker_pids(tmp_path) == []


@pytest.mark.parametrize("way", ["raise", "die"])
def test_a_task_that_always_fails_is_tried_max_attempts_times_and_the_rest_finishes(way: str, tmp_path: Path) -> None:
    outcome, reports, _ = run(partial(Recorder, tmp_path, {1: way}), [0, 1, 2, 3], workers=2, attempts=2)
    assert outcome.results == {0: 0, 2: 4, 3: 9}
    assert attempts_of(tmp_path, 1) == 2
    expected = "task 1 is bad" if way == "raise" else "its worker process died"
    assert expected in outcome.failures[1]
    assert "after 2 attempts" in outcome.failures[1]
    assert sum(n for task, n in reports if task == 1) == 0


@pytest.mark.parametrize("way", ["raise once", "die once"])
def test_a_task_that_fails_once_is_done_at_the_second_attempt_and_counted_once(way: str, tmp_path: Path) -> None:
    outcome, reports, order = run(partial(Recorder, tmp_path, {0: way}), [0, 1], workers=1)
    assert outcome.results == {0: 0, 1: 1}
    assert order == [1, 0]
    assert attempts_of(tmp_path, 0) == 2
    assert sum(n for _, n in reports) == 4


def refuse(error: Exception) -> Any:
    raise error


@pytest.mark.parametrize(
    "error", [UserError("no such teacher: one\ntwo"), FingerprintMismatch("another teacher (differs in: dtype)")]
)
def test_a_user_error_of_a_starting_worker_ends_the_run_with_its_whole_message(error: UserError) -> None:
    with pytest.raises(type(error)) as caught:
        run(partial(refuse, error), [0, 1, 2], workers=2)
    assert str(caught.value) == str(error)


def note_and_die(folder: Path) -> Any:
    (folder / f"start-{os.getpid()}").touch()
    os.kill(os.getpid(), signal.SIGKILL)


def note_and_raise(folder: Path) -> Any:
    (folder / f"start-{time.time_ns()}").touch()
    raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("make", "why"), [(note_and_raise, "out of memory"), (note_and_die, "Worker unexpectedly exits")]
)
def test_workers_that_cannot_start_are_tried_a_bounded_number_of_times(
    make: Callable[[Path], Any], why: str, tmp_path: Path
) -> None:
    outcome, _, _ = run(partial(make, tmp_path), list(range(50)), workers=1, attempts=2)
    assert len(list(tmp_path.glob("start-*"))) == 2
    assert outcome.results == {}
    assert outcome.failures.keys() == set(range(50))
    assert why in outcome.failures[49]
    assert "no worker could start" in outcome.failures[49]


def test_an_interruption_leaves_no_worker_behind(tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(partial(Recorder, tmp_path, {0: "hang"}), [0, 1, 2], workers=2, on_result=interrupt)
    pids = worker_pids(tmp_path)
    assert pids
    assert all(wait_until_dead(pid) for pid in pids)


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
