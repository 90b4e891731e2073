"""Training runs: the stages one after another, each from the student the one before left."""

import json
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from pipeline.interruption import RESUME, SAVED_EXIT_CODE, Interrupted
from pipeline.provenance import provenance
from pipeline.run_file import RunFile, save_run_file
from stages.checkpoints import hide_loading_bars
from stages.student.claim import check_output, decoder_digest
from stages.student.config import DataSource, StageName, TrainConfig
from stages.student.stage import StageReport, StageRun, StepProgress, TrainingStopped
from stages.student.start import StudentStart
from stages.student.training import train_stage
from storage.errors import UserError
from storage.stores import open_store
from storage.stream import Source
from storage.targets import TargetStore

STAGES: tuple[StageName, ...] = ("dpt", "dft", "sft")
StageProgress = Callable[[StageName, StepProgress], None]


def train(
    run: RunFile,
    stages: Sequence[StageName],
    progress: StageProgress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    *,
    resume: bool = True,
) -> list[StageReport]:
    """Trains the named stages in their order, each in its folder `output/STAGE`.

    A stage starts from the student of the last earlier stage that this run folder holds, the first from the bare
    decoder. Finished stages are not run again, an interrupted one goes on from its newest whole checkpoint. Called in
    each process of a group (torchrun, `accelerate launch`, Ray Train), they train together.

    Args:
        run: all settings.
        stages: which.
        progress: called after each step.
        should_stop: asked before each step.
        resume: False refuses a folder that holds a stage already.

    Raises:
        Interrupted: a process was asked to stop; a checkpoint was saved.
        UserError: a missing place, or what `train_stage` raises.
    """
    hide_loading_bars()
    output = Path(_given(run.output, "--output"))
    decoder = _given(run.student, "--student")
    run, accelerator = _with_launcher_settings(run)
    if not resume:
        _refuse_existing(output, stages)
        # No process may begin a stage while another still looks.
        accelerator.wait_for_everyone()
    runs = {name: _stage_run(run, name, decoder, output) for name in STAGES if name in stages}
    # All of them before anything is written: a refusal changes nothing.
    for stage in runs.values():
        check_output(stage)
        if not (stage.output / "report.json").is_file():
            # Whether the student can read the targets at all, with the losses of this stage.
            StudentStart(stage)
    if accelerator.is_main_process:
        save_run_file(run, output / "run.yaml")
        _note_start(output, run.train, runs, accelerator)
    reports = []
    initial: Path | None = None
    for name in STAGES:
        if name in runs:
            stage = replace(runs[name], initial=initial)
            try:
                reports.append(train_stage(stage, accelerator, _for_stage(progress, name), should_stop))
            except TrainingStopped as stop:
                raise Interrupted(signal.SIGTERM, f"{stop}; {RESUME}", SAVED_EXIT_CODE) from None
        if (output / name / "report.json").is_file():
            initial = output / name / "student"
    if accelerator.is_main_process:
        # Of all finished stages, also of earlier commands.
        files = {name: output / name / "report.json" for name in STAGES}
        summary = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
        open_store(output).write("summary.json", json.dumps(summary, indent=1).encode())
    return reports


def train_on_ray(
    run: RunFile,
    stages: Sequence[StageName],
    progress: StageProgress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    *,
    resume: bool = True,
) -> list[StageReport]:
    """As `train`, in processes of a Ray cluster (Ray Train); started again from the newest checkpoint when one dies.

    Folders must be seen by all nodes under the same names.
    """
    from pipeline import ray_cluster

    output = Path(_given(run.output, "--output")).absolute()
    if not resume:
        _refuse_existing(output, stages)
    # Ray Train's processes have a working folder of their own.
    run = _with_absolute_places(run.model_copy(update={"output": str(output)}))
    stopped: list[str] = []

    def receive(kind: str, *said: Any) -> None:
        if kind == "stopped":
            stopped.extend(said)
        elif progress is not None:
            progress(*said)

    with ray_cluster.connect(run.train.ray_address) as cluster:
        ray_cluster.run_group(
            partial(_train_in_group, run, tuple(stages)),
            num_workers=run.train.workers or max(1, cluster.gpus),
            gpus_per_worker=1 if cluster.gpus else 0,
            max_attempts=run.train.max_attempts,
            storage=str(output),
            on_letter=receive,
            should_stop=should_stop,
        )
    if stopped:
        raise Interrupted(signal.SIGTERM, stopped[0], SAVED_EXIT_CODE)
    reports = [output / name / "report.json" for name in STAGES if name in stages]
    return [StageReport.model_validate_json(path.read_text()) for path in reports]


def _refuse_existing(output: Path, stages: Sequence[StageName]) -> None:
    for name in stages:
        if (output / name).exists():
            raise UserError(f"{output} holds {name} already; name a new --output, or leave out --no-resume to go on")


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
    def absolute(place: str | None) -> str | None:
        # Anything else is the address of an object store, or the name of a model.
        return str(Path(place).absolute()) if place is not None and Path(place).exists() else place

    return run.model_copy(update={name: absolute(getattr(run, name)) for name in ("samples", "targets", "student")})


def _with_launcher_settings(run: RunFile) -> tuple[RunFile, Accelerator]:
    """The process group of whatever launcher started this process, and what it asks for as settings of the run."""
    config = run.train
    # `accelerate launch --use_fsdp` would have Accelerate wrap the model itself, which it does not do on CPUs.
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true":
        config = config.model_copy(update={"parallel": "fsdp"})
    # A process that trains several students may do so in different precisions.
    AcceleratorState._reset_state()
    # Said outright, or Accelerate would run torchrun's processes on a machine without a GPU side by side, unjoined.
    accelerator = Accelerator(mixed_precision=_precision(config), cpu=not torch.cuda.is_available())
    return run.model_copy(update={"train": config}), accelerator


def _precision(config: TrainConfig) -> str:
    """Accelerate's word for it."""
    able = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return "bf16" if config.precision == "bf16" or (config.precision == "auto" and able) else "no"


def _note_start(output: Path, config: TrainConfig, runs: dict[StageName, StageRun], accelerator: Accelerator) -> None:
    """A line for each time the run was started: a resumed one may have had other machines and versions."""
    line: dict[str, Any] = {
        **provenance(),
        "num_processes": accelerator.num_processes,
        "parallel": config.parallel,
        "precision": accelerator.mixed_precision,
        "stages": {
            name: {
                "decoder": decoder_digest(stage.decoder),
                "targets": [source.targets.manifest.fingerprint.digest for source in stage.sources],
                "teacher": stage.targets.manifest.fingerprint.teacher_weights,
                "samples": [source.targets.manifest.fingerprint.samples for source in stage.sources],
            }
            for name, stage in runs.items()
        },
    }
    with (output / "provenance.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def last_student(output: Path) -> Path:
    """The student of the last finished stage of a run folder."""
    for name in reversed(STAGES):
        if (output / name / "report.json").is_file():
            return output / name / "student"
    raise UserError(f"{output} holds no finished stage; run `cdp train-student --output {output}`")


def _stage_run(run: RunFile, name: StageName, decoder: str, output: Path) -> StageRun:
    return StageRun(
        name=name,
        config=run.train,
        decoder=decoder,
        initial=None,
        sources=tuple(_opened(source) for source in _sources(run, name)),
        output=output / name,
    )


def _sources(run: RunFile, name: StageName) -> Sequence[DataSource]:
    """What a stage trains on: its own sources or places, else those of the run."""
    stage, config = run.train.stage(name), run.train
    for section, several, one in (
        (f"train.{name}", stage.sources, (stage.samples, stage.targets, stage.subset)),
        ("train", config.sources, (run.samples, run.targets, config.subset)),
    ):
        if several and any(one):
            raise UserError(
                f"{section}.sources is given, and samples, targets or a subset beside it; leave one of them out "
                "(each of the sources can have a subset)"
            )
    if stage.sources:
        return stage.sources
    if config.sources and not (stage.samples or stage.targets):
        if stage.subset:
            raise UserError(f"train.{name}.subset is given beside train.sources; give each of the sources its subset")
        return config.sources
    samples = stage.samples or _given(run.samples, "--samples")
    targets = stage.targets or _given(run.targets, "--targets")
    return [DataSource(samples=samples, targets=targets, subset=stage.subset or config.subset)]


def _opened(source: DataSource) -> Source:
    subset = None if source.subset is None else Path(source.subset)
    return Source(open_store(source.samples), TargetStore.open(source.targets), source.weight, subset)


def _given(value: str | None, flag: str) -> str:
    if value is None:
        raise UserError(f"{flag} is missing; give the flag or set it in the run file")
    return value


def _for_stage(progress: StageProgress | None, name: StageName) -> Callable[[StepProgress], None] | None:
    if progress is None:
        return None
    return lambda step: progress(name, step)
