"""Extraction whose shards are made in this process instead of in actors of a Ray cluster."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

from pipeline.cluster import connection, ray_backend
from pipeline.cluster.worker import Outcome


@contextlib.contextmanager
def without_ray(threads: int = 1, cpus: int = 1) -> Iterator[None]:
    """Inside the block `extract` makes its shards here, `threads` of them at a time."""

    @contextlib.contextmanager
    def connect(_: str | None) -> Iterator[connection.Cluster]:
        yield connection.Cluster(cpus=cpus, gpus=0)

    def run_tasks(make_worker: Any, tasks: list[int], _: ray_backend.TaskLimits, **calls: Any) -> Outcome:
        work = make_worker()

        def run(task: int) -> None:
            calls["on_result"](task, work(task, lambda amount: calls["on_progress"](task, amount)))

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, tasks))
        return Outcome()

    with patch.object(connection, "connect", connect), patch.object(ray_backend, "run_tasks", run_tasks):
        yield
