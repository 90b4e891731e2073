"""Training in the processes of a Ray cluster: the same `train`, started in each of them."""

import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from pipeline.cluster import connection, ray_train_group
from pipeline.run_file import RunFile, need
from pipeline.runtime.interruption import SAVED_EXIT_CODE, Interrupted, remembered
from pipeline.training import train
from stages.student.run_folder import RunFolder, StageReport
from stages.student.stage_config import STAGES, StageName
from storage.errors import UserError
from storage.progress import SILENT, Progress, ProgressTask
from storage.stores import open_store
from storage.stores.folder_owner import owned

LOCATIONS = ("samples", "targets", "student", "output", "subset", "validation_subset")
"""Settings, of the run or of its parts, that may name a folder or file."""


def train_on_ray(
    run: RunFile,
    stages: Sequence[StageName],
    progress: Progress = SILENT,
    should_stop: Callable[[], bool] = lambda: False,
    *,
    resume: bool = True,
) -> list[StageReport]:
    """As `train`, with Ray Train; the group is started again from the newest checkpoint when a process dies.

    Folders must be seen by all nodes, and by this process, under the same names.

    Raises:
        UserError: If a process does not see this one's run folder, or as `train`.
    """
    output = Path(need(run.output, "--output")).absolute()
    # The run folder itself belongs to the first process of the group.
    with owned(output / ray_train_group.RUN_NAME):
        return _train(run, output, stages, progress, should_stop, resume=resume)


def _train(
    run: RunFile,
    output: Path,
    stages: Sequence[StageName],
    progress: Progress,
    should_stop: Callable[[], bool],
    *,
    resume: bool,
) -> list[StageReport]:
    if not resume:
        RunFolder(output).refuse_existing(stages)
    stopped: list[str] = []

    tasks: dict[str, ProgressTask] = {}

    def receive(kind: str, name: str, *said: Any) -> None:
        if kind == "stopped":
            stopped.append(name)
        elif kind == "task" and name not in tasks:
            tasks[name] = progress.task(name, *said)
        elif kind == "update":
            tasks[name].update(**said[0])
        elif kind == "message":
            progress.message(name)

    # Connecting takes the signals for Ray, so that they are remembered anew after it.
    signals = remembered(signal.SIGTERM, signal.SIGINT)
    connected = connection.connect(run.train.cluster.ray_address)
    with connected as cluster, signals as asked_to_stop, _marker_file(output) as marker:
        ray_train_group.run_group(
            partial(_train_in_group, _with_absolute_paths(run), tuple(stages), marker),
            num_workers=run.train.cluster.workers or max(1, cluster.gpus),
            gpus_per_worker=1 if cluster.gpus else 0,
            max_attempts=run.train.cluster.max_attempts,
            storage=str(output),
            on_message=receive,
            should_stop=lambda: should_stop() or asked_to_stop(),
        )
    if stopped:
        raise Interrupted(signal.SIGTERM, stopped[0], SAVED_EXIT_CODE)
    return [RunFolder(output).stage(name).report() for name in STAGES if name in stages]


@contextmanager
def _marker_file(output: Path) -> Iterator[Path]:
    """A file in the run folder; a process that finds it sees the same folder as this process."""
    # In a folder that Ray Train makes in any case.
    store, name = open_store(output / ray_train_group.RUN_NAME), f"driver-{uuid4().hex}"
    store.write(name, b"")
    marker = output / ray_train_group.RUN_NAME / name
    try:
        yield marker
    finally:
        marker.unlink(missing_ok=True)


@dataclass(frozen=True)
class _SentProgress:
    """Sends what is shown to the process of the command."""

    send: Callable[..., None]
    name: str = ""

    def task(
        self, name: str, total: float | None = None, unit: str = "samples", *, detail: bool = False
    ) -> "_SentProgress":
        self.send("task", name, total, unit)
        return _SentProgress(self.send, name)

    def advance(self, amount: float = 1) -> None:
        raise NotImplementedError("training says how far it is, not how much was done since")

    def update(self, **said: Any) -> None:
        self.send("update", self.name, said)

    def remove(self) -> None:
        pass

    def message(self, text: str) -> None:
        self.send("message", text)


def _train_in_group(
    run: RunFile,
    stages: Sequence[StageName],
    marker: Path,
    send: Callable[..., None],
    should_stop: Callable[[], bool],
) -> None:
    """In each process of the group."""
    if not marker.is_file():
        raise UserError(
            f"{run.output} on {socket.gethostname()} is another folder than where the command was given: it lacks "
            f"{marker.name}, written there. Name an --output that all nodes of the Ray cluster and the machine of the "
            "command see, such as a folder of a network file system"
        )
    first = int(os.environ["RANK"]) == 0
    try:
        # It is enough to ask one: the processes tell each other.
        asked = should_stop if first else (lambda: False)
        train(run, stages, _SentProgress(send) if first else SILENT, asked)
    except Interrupted as stop:
        if first:
            send("stopped", str(stop))


def _with_absolute_paths(run: RunFile) -> RunFile:
    """The settings as processes with another working folder understand them."""
    return RunFile.model_validate(_absolute(run.model_dump(mode="json")))


def _absolute(settings: Any, name: str = "") -> Any:
    if isinstance(settings, dict):
        return {key: _absolute(value, key) for key, value in settings.items()}
    if isinstance(settings, list):
        return [_absolute(one) for one in settings]
    # Anything else is the address of an object store, or the name of a model.
    if name in LOCATIONS and isinstance(settings, str) and (name == "output" or Path(settings).exists()):
        return str(Path(settings).absolute())
    return settings
