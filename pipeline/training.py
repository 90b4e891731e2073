"""Training runs: the stages one after another, each from the student the one before left."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from pipeline.run_file import RunFile, save_run_file
from stages.checkpoints import hide_loading_bars
from stages.student.claim import check_output
from stages.student.config import StageName
from stages.student.stage import StageReport, StageRun, StepProgress
from stages.student.training import train_stage
from storage.errors import UserError
from storage.stores import open_store
from storage.targets import TargetStore

STAGES: tuple[StageName, ...] = ("dpt", "dft", "sft")


def train(
    run: RunFile,
    stages: Sequence[StageName],
    progress: Callable[[StageName, StepProgress], None] | None = None,
) -> list[StageReport]:
    """Trains the named stages in their order, each in its folder `output/STAGE`.

    A stage starts from the student of the last earlier stage that this run folder holds, the first from the bare
    decoder. Finished stages are not run again, an interrupted one goes on from its newest checkpoint.

    Raises:
        UserError: a missing place, or what `train_stage` raises.
    """
    hide_loading_bars()
    output = Path(_given(run.output, "--output"))
    decoder = _given(run.student, "--student")
    # Said outright, or Accelerate would run torchrun's processes on a machine without a GPU side by side, unjoined.
    accelerator = Accelerator(mixed_precision=run.train.precision, cpu=not torch.cuda.is_available())
    runs = {name: _stage_run(run, name, decoder, output) for name in STAGES if name in stages}
    # All of them before anything is written: a refusal changes nothing.
    for stage in runs.values():
        check_output(stage)
    if accelerator.is_main_process:
        save_run_file(run, output / "run.yaml")
    reports = []
    initial: Path | None = None
    for name in STAGES:
        if name in runs:
            stage = replace(runs[name], initial=initial)
            reports.append(train_stage(stage, accelerator, _for_stage(progress, name)))
        if (output / name / "report.json").is_file():
            initial = output / name / "student"
    if accelerator.is_main_process:
        summary = {report.stage: report.model_dump() for report in reports}
        open_store(output).write("summary.json", json.dumps(summary, indent=1).encode())
    return reports


def last_student(output: Path) -> Path:
    """The student of the last finished stage of a run folder."""
    for name in reversed(STAGES):
        if (output / name / "report.json").is_file():
            return output / name / "student"
    raise UserError(f"{output} holds no finished stage; run `cdp train-student --output {output}`")


def _stage_run(run: RunFile, name: StageName, decoder: str, output: Path) -> StageRun:
    config = run.train.stage(name)
    return StageRun(
        name=name,
        config=run.train,
        decoder=decoder,
        initial=None,
        samples=open_store(config.samples or _given(run.samples, "--samples")),
        targets=TargetStore.open(config.targets or _given(run.targets, "--targets")),
        output=output / name,
    )


def _given(value: str | None, flag: str) -> str:
    if value is None:
        raise UserError(f"{flag} is missing; give the flag or set it in the run file")
    return value


def _for_stage(
    progress: Callable[[StageName, StepProgress], None] | None, name: StageName
) -> Callable[[StepProgress], None] | None:
    if progress is None:
        return None
    return lambda step: progress(name, step)
