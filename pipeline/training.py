"""Training runs: the stages one after another, each from the student of the one before."""

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, gather_object

from pipeline.run_file import RunFile, need, save_run_file, sources_of
from pipeline.runtime.interruption import RESUME, SAVED_EXIT_CODE, Interrupted
from pipeline.runtime.provenance import provenance
from stages.checkpoints.processors import hide_loading_bars
from stages.student.run_folder import RunFolder, StageFolder, StageReport
from stages.student.stage_config import STAGES, DataSource, StageName
from stages.student.store_check import check_one_teacher
from stages.student.training.loop import train_stage
from stages.student.training.objective import DistillationObjective
from stages.student.training.resume_guard import check_resumable, decoder_digest, gguf_record
from stages.student.training.setup import StageSetup
from stages.student.training.stage_run import StageRun, TrainingStopped
from stages.student.training.train_config import TrainConfig
from storage.errors import UserError
from storage.progress import SILENT, Progress
from storage.samples.sample_set import SampleSet
from storage.stores import open_store
from storage.stores.folder_owner import owned
from storage.streaming.stream import Source
from storage.targets.store import TargetStore

_USE_FSDP = "ACCELERATE_USE_FSDP"
_NOT_SERVED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
"""Ways of `accelerate launch` that would wrap the student in another way than `train.parallel.strategy` says."""


def train(
    run: RunFile,
    stages: Sequence[StageName],
    progress: Progress = SILENT,
    should_stop: Callable[[], bool] = lambda: False,
    *,
    resume: bool = True,
    objective: type[DistillationObjective] = DistillationObjective,
) -> list[StageReport]:
    """Trains the named stages in their order, each in its folder `output/STAGE`.

    A stage starts from the student of the last earlier stage that this run folder holds, the first from the bare
    decoder. Finished stages are not run again, an interrupted one goes on from its newest whole checkpoint. Called in
    each process of a group (torchrun, `accelerate launch`, Ray Train), they train together.

    Args:
        run: all settings.
        stages: which.
        progress: shows a task for each stage.
        should_stop: asked before each step.
        resume: False refuses a folder that holds a stage already.
        objective: computes the losses of a batch; another than the product's is for comparisons.

    Raises:
        Interrupted: If a process was asked to stop; a checkpoint was saved.
        FolderInUse: If another command works in the run folder.
        UserError: If a path is missing, or as `train_stage`.
    """
    hide_loading_bars()
    folder = RunFolder(Path(need(run.output, "--output")))
    decoder = need(run.student, "--student")
    # What is saved is what was done, also where the stages were named beside the settings.
    run = run.model_copy(update={"train": run.train.model_copy(update={"stages": tuple(stages)})})
    run, accelerator = _with_launcher_settings(run)
    with _owned_by_all(folder, accelerator):
        return _train(run, decoder, accelerator, progress, should_stop, resume=resume, objective=objective)


@contextmanager
def _owned_by_all(folder: RunFolder, accelerator: Accelerator) -> Iterator[None]:
    """The main process owns the run folder for all of them; if it cannot, all say so."""
    with ExitStack() as held:
        refusals: list[UserError] = []
        if accelerator.is_main_process:
            try:
                held.enter_context(owned(folder.path))
            except UserError as error:
                refusals.append(error)
        if refusals := gather_object(refusals):
            raise refusals[0]
        yield


def _train(
    run: RunFile,
    decoder: str,
    accelerator: Accelerator,
    progress: Progress,
    should_stop: Callable[[], bool],
    *,
    resume: bool,
    objective: type[DistillationObjective],
) -> list[StageReport]:
    """As `train`, in a run folder that belongs to these processes."""
    folder, stages = RunFolder(Path(need(run.output, "--output"))), run.train.stages
    if not resume:
        folder.refuse_existing(stages)
        # No process may begin a stage while another still looks.
        accelerator.wait_for_everyone()
    stores: dict[str, TargetStore] = {}
    stage_runs = {
        name: replace(_stage_run(run, name, decoder, folder, stores), objective=objective)
        for name in STAGES
        if name in stages
    }
    if run.train.vision == "teacher":
        check_one_teacher(
            {name: stage.targets.manifest.fingerprint.teacher_weights for name, stage in stage_runs.items()}
        )
    # All stages are checked before anything is written: a refusal changes nothing.
    setups = {name: _checked(stage) for name, stage in stage_runs.items()}
    if accelerator.is_main_process:
        save_run_file(run, open_store(folder.path), folder.run_file.name)
        _note_start(folder, run.train, stage_runs, accelerator)
    reports = []
    for name, stage in stage_runs.items():
        try:
            reports.append(train_stage(stage, accelerator, progress, should_stop, setups.pop(name)))
        except TrainingStopped as stop:
            raise Interrupted(signal.SIGTERM, f"{stop}; {RESUME}", SAVED_EXIT_CODE) from None
    if accelerator.is_main_process:
        folder.write_summary()
    return reports


def _with_launcher_settings(run: RunFile) -> tuple[RunFile, Accelerator]:
    """The process group that a launcher began, if one did, and what it and the machine decide of the settings."""
    config = run.train
    for variable, name in _NOT_SERVED.items():
        if os.environ.get(variable, "").lower() == "true":
            raise UserError(
                f"{variable} asks for {name}, which students are not trained with; launch with --multi_gpu or "
                "--use_fsdp, or unset it"
            )
    # `accelerate launch --use_fsdp` would have Accelerate wrap the model itself, which it does not do on CPUs.
    asked = os.environ.pop(_USE_FSDP, None)
    # A process that trains several students may do so in different precisions.
    AcceleratorState._reset_state()
    able = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    precision = ("bf16" if able else "fp32") if config.parallel.precision == "auto" else config.parallel.precision
    # Said outright, or Accelerate would run torchrun's processes on a machine without a GPU side by side, unjoined.
    # And outright how gradients are summed and that nothing is compiled, which else the environment decides.
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        cpu=not torch.cuda.is_available(),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_backend="no",
    )
    found: dict[str, str] = {"precision": precision}
    if asked is not None:
        # For the next student of this process.
        os.environ[_USE_FSDP] = asked
        if asked.lower() == "true":
            found["strategy"] = "fsdp"
    parallel = config.parallel.model_copy(update=found)
    return run.model_copy(update={"train": config.model_copy(update={"parallel": parallel})}), accelerator


def _note_start(
    folder: RunFolder, config: TrainConfig, stage_runs: dict[StageName, StageRun], accelerator: Accelerator
) -> None:
    """A line for each time the run was started: a resumed one may have had other machines and versions."""
    line: dict[str, Any] = {
        **provenance(),
        "num_processes": accelerator.num_processes,
        "parallel": config.parallel.strategy,
        "precision": accelerator.mixed_precision,
        "stages": {
            name: {
                "decoder": decoder_digest(stage.decoder),
                **gguf_record(stage.decoder),
                "targets": [source.targets.manifest.fingerprint.digest for source in stage.sources],
                "teacher": stage.targets.manifest.fingerprint.teacher_weights,
                "samples": [source.targets.manifest.fingerprint.samples for source in stage.sources],
            }
            for name, stage in stage_runs.items()
        },
    }
    store, name = open_store(folder.path), "provenance.jsonl"
    before = store.read(name) if store.exists(name) else b""
    store.write(name, before + json.dumps(line).encode() + b"\n")


def _checked(stage: StageRun) -> StageSetup | None:
    """Refuses a stage that cannot be trained; its setup, if it is to be trained and what it starts from is there."""
    check_resumable(stage)
    if stage.folder.is_finished:
        return None
    if stage.initial is None or StageFolder.of_student(stage.initial).is_finished:
        return StageSetup(stage)
    # Whether the decoder, which the student to come will have, can read the targets at all, with this stage's losses.
    StageSetup(replace(stage, initial=None))
    return None


def _stage_run(
    run: RunFile, name: StageName, decoder: str, folder: RunFolder, stores: dict[str, TargetStore]
) -> StageRun:
    """`stores` are those opened already: reading all records of one may take minutes."""
    earlier = STAGES[: STAGES.index(name)]
    # That are finished, or will be when this one's turn comes.
    before = [one for one in earlier if one in run.train.stages or folder.stage(one).is_finished]
    return StageRun(
        name=name,
        config=run.train,
        decoder=decoder,
        initial=folder.stage(before[-1]).student if before else None,
        sources=tuple(_opened(source, stores) for source in sources_of(run, name)),
        output=folder.stage(name).path,
    )


def _opened(source: DataSource, stores: dict[str, TargetStore]) -> Source:
    subset = None if source.subset is None else Path(source.subset)
    if source.targets not in stores:
        stores[source.targets] = TargetStore.open(source.targets)
    return Source(SampleSet.open(source.samples), stores[source.targets], source.weight, subset)
