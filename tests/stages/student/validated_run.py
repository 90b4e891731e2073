"""A stage that measures its losses on held-out samples; alone or as processes of torchrun.

    python -m tests.stages.student.validated_run FOLDER NAME SETTINGS [STOP_AT]

FOLDER holds `samples`, `targets` and `lm`; the stage goes to `FOLDER/NAME`. SETTINGS are JSON. With STOP_AT the process
ends with 0 in that step, before it is saved.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from stages.settings import validated
from stages.student.run_folder import StageReport
from stages.student.training.loop import train_stage
from stages.student.training.stage_run import StageRun
from stages.student.training.train_config import TrainConfig
from storage.progress import SILENT, Progress
from storage.samples.sample_set import SampleSet
from storage.streaming.stream import Source
from storage.targets.store import TargetStore
from tests.recorded_progress import RecordedProgress

HELD_OUT = tuple(f"{number:09d}" for number in (0, 3, 4, 8, 14))
"""One turn, several turns, text alone, several turns, text alone; 15 samples are left."""
SETTINGS: dict[str, Any] = {
    "dft": {"batch_size": 6, "epochs": 2, "learning_rate": 1e-3},
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.2},
    "loader": {"microbatch_size": 2, "num_workers": 0},
    "checkpoint": {"every": 2},
    "logging": {"every": 1, "trackers": []},
}
"""Three steps an epoch, the last one shorter, with dropout."""


class Stopped(Exception):
    """The stage was ended where it was asked to."""


def stop_at(step: float) -> RecordedProgress:
    """Ends the stage in a step, before its checkpoint."""

    def stop(_: str, done: float) -> None:
        if done == step:
            raise Stopped

    return RecordedProgress(at_step=stop)


def train_validated(
    folder: Path,
    name: str,
    settings: dict[str, Any],
    *,
    subset: Path | None = None,
    progress: Progress = SILENT,
    should_stop: Callable[[], bool] = lambda: False,
) -> StageReport:
    """Trains DFT with some settings beside those above."""
    config = validated(TrainConfig, {**SETTINGS, **settings}, "a test")
    source = Source(SampleSet.open(folder / "samples"), TargetStore.open(folder / "targets"), subset=subset)
    run = StageRun("dft", config, str(folder / "lm"), None, (source,), folder / name)
    return train_stage(run, Accelerator(cpu=True), progress, should_stop)


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        train_validated(
            Path(sys.argv[1]),
            sys.argv[2],
            json.loads(sys.argv[3]),
            progress=stop_at(float(sys.argv[4])) if len(sys.argv) > 4 else SILENT,
        )
    except Stopped:
        sys.exit(0)
