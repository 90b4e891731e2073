"""The training loop of one stage: stream, step, log, checkpoint, resume."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from stages.attention.capture import enable_capture
from stages.student.data.batch import Batch
from stages.student.data.loader import LoaderDied, StepLoader
from stages.student.model.student import decoder_of
from stages.student.model.trainable import keep_frozen_in, merge_lora
from stages.student.run_folder import STUDENT, StageReport
from stages.student.training.checkpoint import (
    Checkpoints,
    Position,
    TrainerState,
    disk_errors,
    load_trained,
    trained_tensors,
)
from stages.student.training.metrics import MetricsLog
from stages.student.training.objective import BatchTotals, DistillationObjective
from stages.student.training.parallel import clip_gradients, gradients_stay, spread
from stages.student.training.rank_consistency import check_same_folder, check_same_position
from stages.student.training.resume_guard import check_resumable, record_stage
from stages.student.training.setup import StageSetup
from stages.student.training.stage import StageRun, TrainingStopped
from storage.errors import UserError
from storage.progress import SILENT, Progress
from storage.stores import open_store

logger = logging.getLogger(__name__)


def train_stage(
    run: StageRun,
    accelerator: Accelerator,
    progress: Progress = SILENT,
    should_stop: Callable[[], bool] = lambda: False,
    setup: StageSetup | None = None,
) -> StageReport:
    """Trains one stage, from its newest whole checkpoint if it has one; a finished stage is not trained again.

    Leaves `student/` (a Hugging Face folder, LoRA merged), `checkpoints/`, `metrics.jsonl` and `report.json`.

    Args:
        run: what is trained on what.
        accelerator: of this process.
        progress: shows a task of the stage's name, in steps.
        should_stop: asked before each step. If it says yes in any process, all of them save a checkpoint and stop.
        setup: of this stage, if it is known already.

    Raises:
        TrainingStopped: If a process was asked to stop; the checkpoint is saved.
        UserError: If the folder holds the same stage with other settings, the student does not fit the targets, the
            processes do not see the same folder, or the loss is no longer finite.
    """
    # In all processes, so that all of them say what is wrong.
    check_resumable(run)
    if accelerator.is_main_process:
        record_stage(run)
    accelerator.wait_for_everyone()
    check_same_folder(accelerator, run)
    # Again, with what was written: an incomplete store may have grown in between.
    check_resumable(run)
    if accelerator.is_main_process:
        # A killed process may have left gigabytes half-written.
        open_store(run.output).remove_partials()
    if run.folder.is_finished:
        return run.folder.report()
    try:
        with torch.random.fork_rng(devices=[]):
            return _StageLoop(run, setup or StageSetup(run), accelerator, progress, should_stop).train()
    finally:
        # Accelerate keeps what it prepared: a student for each stage, on the GPU.
        accelerator.free_memory()


class _StageLoop:
    """A stage that is being trained."""

    def __init__(
        self,
        run: StageRun,
        setup: StageSetup,
        accelerator: Accelerator,
        progress: Progress,
        should_stop: Callable[[], bool],
    ) -> None:
        self.run, self.accelerator, self.progress, self.should_stop = run, accelerator, progress, should_stop
        self.setup = setup
        config, stage = run.config, run.stage
        # Before the student is loaded, so that loader processes start meanwhile.
        self.loader = StepLoader(
            setup.mixture,
            setup.collator,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            device=accelerator.device,
            config=config.loader,
            with_maps=stage.attention_weight > 0,
        )
        self.student, self.peft = setup.load()
        enable_capture(self.student)
        if config.parallel.activation_checkpointing:
            # Reentrant checkpointing silently gives captured maps no gradient.
            self.student.activation_checkpointing_enable({"use_reentrant": False})
        if accelerator.mixed_precision == "bf16":
            keep_frozen_in(self.student, torch.bfloat16)
        if accelerator.is_main_process:
            # Also in the report, but a note may be a reason to stop now.
            for note in setup.notes:
                logger.warning("%s: %s", run.name, note)
        self.steps_per_epoch = self.loader.mixture.num_steps
        self.num_steps = min(stage.epochs * self.steps_per_epoch, stage.max_steps or 2**62)

        logits = run.targets.manifest.fingerprint.logit_codec
        objective = DistillationObjective(self.student, stage, logits, setup.matching)
        self.objective = spread(objective, decoder_of(self.student), accelerator, config.parallel.strategy)
        self.trained = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=stage.learning_rate, weight_decay=0.0)
        self.scheduler = get_cosine_schedule_with_warmup(
            self.optimizer, round(stage.warmup_ratio * self.num_steps), self.num_steps
        )
        self.state = TrainerState(self.student, self.optimizer, self.scheduler)
        self.checkpoints = Checkpoints(
            run.folder.checkpoints, config.checkpoint.keep, write=accelerator.is_main_process
        )
        self.position = self.checkpoints.restore(self.state)
        check_same_position(accelerator, run, self.position)

    def train(self) -> StageReport:
        """Trains to the last step and saves the student."""
        config = self.run.config
        waiting: list[float] = []
        self.student.train()
        begun = time.perf_counter()
        began_stage = begun - self.position.seconds
        task = self.progress.task(self.run.name, self.num_steps, unit="steps")
        task.update(done=self.position.step)
        groups = self.loader.steps(range(self.position.epoch, self.run.stage.epochs), self.position.epoch_step)
        with closing(self._metrics_log()) as log, closing(groups):
            while self.position.step < self.num_steps:
                before = time.perf_counter()
                group = self._next_group(groups)
                waiting.append(time.perf_counter() - before)
                totals = self._totals(group)
                losses = self._step(group, totals)
                self._advance(losses, time.perf_counter() - began_stage)
                step = self.position.step
                if step % config.logging.every == 0 or step == self.num_steps:
                    log.write(step, {**losses, "samples": self.position.samples, "seconds": self.position.seconds})
                task.update(done=step, note=_step_text(losses, self.position))
                # Also after the last step, so that no step is repeated if saving the student fails.
                if step % config.checkpoint.every == 0 or step == self.num_steps:
                    self.checkpoints.save(self.position, self.state)
        first_batch_s, *later = waiting or [0.0]
        seconds = time.perf_counter() - begun - first_batch_s
        return self._finish(first_batch_s, sum(later) / max(seconds, 1e-9))

    def _metrics_log(self) -> MetricsLog:
        run = self.run
        settings = run.config.model_dump(mode="json") | {"stage": run.name, "decoder": run.decoder}
        main = self.accelerator.is_main_process
        return MetricsLog(run.output, run.config.logging.trackers, self.position.step, settings, enabled=main)

    def _next_group(self, groups: Iterator[list[Batch]]) -> list[Batch]:
        """The microbatches of one optimizer step; fewer at an epoch's end."""
        try:
            return next(groups)
        except LoaderDied:
            if not self.should_stop():
                raise
            # A launcher that stops the job may stop its loader processes first.
            return []

    def _step(self, group: list[Batch], totals: BatchTotals) -> dict[str, float]:
        """One optimizer step; returns each loss term of the global batch, and the rate and norm it was taken with."""
        self._seed_step()
        terms: dict[str, Tensor] = {}
        total_loss = torch.zeros((), device=self.accelerator.device)
        for index, batch in enumerate(group):
            # One microbatch at a time, so that the device holds no other.
            batch = batch.to(self.accelerator.device, self.student.dtype)
            last = index == len(group) - 1
            with nullcontext() if last else gradients_stay(self.objective, self.accelerator):
                with self.accelerator.autocast():
                    loss, shares = self.objective(batch, totals)
                # Gradients are averaged over ranks, but the shares already sum to the global mean.
                self.accelerator.backward(loss * self.accelerator.num_processes)
            total_loss += loss.detach()
            for name, value in shares.items():
                terms[name] = terms.get(name, torch.zeros_like(value)) + value
        norm = float(clip_gradients(self.trained, self.run.config.max_grad_norm))
        # Summed over all processes: one whose own loss is finite must stop here too.
        summed = self.accelerator.reduce(torch.stack([total_loss, *terms.values()]), reduction="sum").tolist()
        for name, value in (("loss", summed[0]), ("gradient", norm)):
            if not math.isfinite(value):
                keys = ", ".join(gather_object([key for batch in group for key in batch.keys]))
                raise UserError(
                    f"the {name} is {value} at step {self.position.step + 1}; the batch holds samples {keys}. "
                    "Lower the learning rate, or look at these samples"
                )
        rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        names = ["loss", *terms]
        return {**dict(zip(names, summed, strict=True)), "learning_rate": rate, "grad_norm": norm}

    def _seed_step(self) -> None:
        """Makes dropout depend on the number of the step alone, whatever ran before it in this process."""
        address = (self.run.config.seed, self.position.step, self.accelerator.process_index)
        torch.manual_seed(int(np.random.SeedSequence(address).generate_state(1, np.uint64)[0]))

    def _totals(self, group: list[Batch]) -> BatchTotals:
        """Counts of the global batch. The request to stop is summed with them, so that all processes stop at one step.

        Raises:
            TrainingStopped: In all processes, after a checkpoint.
        """
        counts = torch.tensor(
            [
                sum(len(b.answers) for b in group),
                sum(b.num_with_image for b in group),
                sum(len(b.keys) for b in group),
                self.should_stop(),
            ],
            device=self.accelerator.device,
        )
        rows, images, self.samples_in_step, stop = self.accelerator.reduce(counts, reduction="sum").tolist()
        if stop:
            self.checkpoints.save(self.position, self.state)
            raise TrainingStopped(self.run.name, self.position.step)
        return BatchTotals(rows, images)

    def _advance(self, losses: dict[str, float], seconds: float) -> None:
        position = self.position
        sums, num_summed = position.loss_sums, position.num_summed
        if position.step >= self.num_steps - max(1, self.num_steps // 10):
            terms = {name: value for name, value in losses.items() if name not in ("learning_rate", "grad_norm")}
            sums = {name: sums.get(name, 0.0) + value for name, value in terms.items()}
            num_summed += 1
        epoch, epoch_step = position.epoch, position.epoch_step + 1
        if epoch_step == self.steps_per_epoch:
            epoch, epoch_step = epoch + 1, 0
        samples = position.samples + self.samples_in_step
        self.position = Position(position.step + 1, epoch, epoch_step, samples, seconds, sums, num_summed)

    def _finish(self, first_batch_s: float, wait_share: float) -> StageReport:
        run = self.run
        report = StageReport(
            stage=run.name,
            steps=self.position.step,
            samples=self.position.samples,
            trained_parameters=sum(p.numel() for p in self.trained),
            seconds=self.position.seconds,
            samples_per_s=self.position.samples / max(self.position.seconds, 1e-9),
            first_batch_s=first_batch_s,
            wait_share=wait_share,
            losses={name: value / self.position.num_summed for name, value in self.position.loss_sums.items()},
            notes=tuple(self.setup.notes),
        )
        trained = trained_tensors(self.student, wanted=self.accelerator.is_main_process)
        if self.accelerator.is_main_process:
            _save_student(run, self.setup, trained)
            run.folder.finish(report)
        self.accelerator.wait_for_everyone()
        return report


def _step_text(losses: dict[str, float], position: Position) -> str:
    """What is shown beside the number of steps."""
    terms = [f"{name} {losses[name]:.3f}" for name in ("lm", "kd", "attention") if name in losses]
    speed = position.samples / max(position.seconds, 1e-9)
    return ", ".join([*terms, f"learning rate {losses['learning_rate']:.2g}", f"{speed:,.1f} samples/s"])


def _save_student(run: StageRun, setup: StageSetup, trained: dict[str, Tensor]) -> None:
    """The student that the stage started from with what was trained, LoRA merged; in float32, with plain sdpa."""
    student, peft = setup.load()
    load_trained(student, trained)
    student = merge_lora(peft, student)
    with disk_errors(run.folder.student), open_store(run.output).new_tree(STUDENT) as folder:
        student.save_pretrained(folder)
        setup.processor.save_pretrained(folder)
