"""Training in the processes of a Ray cluster: the same `train`, started in each of them."""

import os
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import ray_cluster
from pipeline.flags import need
from pipeline.interruption import SAVED_EXIT_CODE, Interrupted, remembered
from pipeline.run_file import RunFile
from pipeline.training import STAGES, StageProgress, refuse_existing, train
from stages.student.config import StageName
from stages.student.stage import StageReport

PLACES = ("samples", "targets", "student", "output", "subset")
"""Settings, of the run or of its parts, that may name a folder or file."""


def train_on_ray(
    run: RunFile,
    stages: Sequence[StageName],
    progress: StageProgress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    *,
    resume: bool = True,
) -> list[StageReport]:
    """As `train`, with Ray Train; the group is started again from the newest checkpoint when a process dies.

    Folders must be seen by all nodes under the same names.
    """
    output = Path(need(run.output, "--output")).absolute()
    if not resume:
        refuse_existing(output, stages)
    stopped: list[str] = []

    def receive(kind: str, *said: Any) -> None:
        if kind == "stopped":
            stopped.extend(said)
        elif progress is not None:
            progress(*said)

    # Connecting takes the signals for Ray, so that they are remembered anew after it.
    signals = remembered(signal.SIGTERM, signal.SIGINT)
    with ray_cluster.connect(run.train.ray_address) as cluster, signals as asked_to_stop:
        ray_cluster.run_group(
            partial(_train_in_group, _with_absolute_places(run), tuple(stages)),
            num_workers=run.train.workers or max(1, cluster.gpus),
            gpus_per_worker=1 if cluster.gpus else 0,
            max_attempts=run.train.max_attempts,
            storage=str(output),
            on_letter=receive,
            should_stop=lambda: should_stop() or asked_to_stop(),
        )
    if stopped:
        raise Interrupted(signal.SIGTERM, stopped[0], SAVED_EXIT_CODE)
    reports = [output / name / "report.json" for name in STAGES if name in stages]
    return [StageReport.model_validate_json(path.read_text()) for path in reports]


def _train_in_group(
    run: RunFile, stages: Sequence[StageName], send: Callable[..., None], should_stop: Callable[[], bool]
) -> None:
    """In each process of the group."""
    first = int(os.environ["RANK"]) == 0
    try:
        # One that asks is enough: the processes tell each other.
        asked = should_stop if first else (lambda: False)
        train(run, stages, (lambda *step: send("step", *step)) if first else None, asked)
    except Interrupted as stop:
        if first:
            send("stopped", str(stop))


def _with_absolute_places(run: RunFile) -> RunFile:
    """Ray Train's processes have a working folder of their own."""
    return RunFile.model_validate(_absolute(run.model_dump(mode="json")))


def _absolute(settings: Any, name: str = "") -> Any:
    if isinstance(settings, dict):
        return {key: _absolute(value, key) for key, value in settings.items()}
    if isinstance(settings, list):
        return [_absolute(one) for one in settings]
    # Anything else is the address of an object store, or the name of a model.
    if name in PLACES and isinstance(settings, str) and (name == "output" or Path(settings).exists()):
        return str(Path(settings).absolute())
    return settings
