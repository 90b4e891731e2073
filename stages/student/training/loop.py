"""The training loop of one stage: stream, step, log, checkpoint, resume."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from stages.attention.capture import enable_capture
from stages.student.data.batch import Batch
from stages.student.data.loader import LoaderDied, StepLoader, StoppedWaiting
from stages.student.model.student import decoder_of
from stages.student.model.trainable import keep_frozen_in
from stages.student.run_folder import STUDENT, StageReport
from stages.student.training.checkpoint import Checkpoints, TrainerState, load_trained, trained_parameters
from stages.student.training.metrics import metrics_log
from stages.student.training.objective import BatchTotals, DistillationObjective
from stages.student.training.parallel import clip_gradients, gathered, gradients_stay, spread
from stages.student.training.rank_consistency import check_same_folder, check_same_position
from stages.student.training.resume_guard import check_resumable, record_stage
from stages.student.training.setup import StageSetup
from stages.student.training.stage_run import StageRun, TrainingStopped
from storage.errors import UserError, disk_errors_named
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

    `should_stop` is asked before each step. If it says yes in any process, all of them save a checkpoint and stop.

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
    # Again, with what was written: an incomplete store may have grown in between, and where a file system has no locks
    # another run may have begun the stage.
    check_resumable(run)
    if accelerator.is_main_process:
        # A killed process may have left gigabytes half-written.
        open_store(run.output).remove_partials()
    if run.folder.is_finished:
        return run.folder.report()
    try:
        with torch.random.fork_rng(devices=[]):
            return _StageLoop(run, setup or StageSetup(run), accelerator, should_stop).train(progress)
    finally:
        # Accelerate keeps what it prepared: a student for each stage, on the GPU.
        accelerator.free_memory()


class _StageLoop:
    """A stage that is being trained."""

    def __init__(
        self, run: StageRun, setup: StageSetup, accelerator: Accelerator, should_stop: Callable[[], bool]
    ) -> None:
        self.run, self.setup, self.accelerator, self.should_stop = run, setup, accelerator, should_stop
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
        self.trained = trained_parameters(self.student)
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=stage.learning_rate, weight_decay=0.0)
        warmup_steps = round(stage.warmup_ratio * self.num_steps)
        self.scheduler = get_cosine_schedule_with_warmup(self.optimizer, warmup_steps, self.num_steps)
        self.state = TrainerState(self.student, self.optimizer, self.scheduler)
        checkpoints, main = run.folder.checkpoints, accelerator.is_main_process
        self.checkpoints = Checkpoints(checkpoints, config.checkpoint.keep, write=main)
        self.position = self.checkpoints.restore(self.state)
        check_same_position(accelerator, run, self.position)

    def train(self, progress: Progress) -> StageReport:
        """Trains to the last step and saves the student."""
        run, config = self.run, self.run.config
        waiting: list[float] = []
        self.student.train()
        begun = time.perf_counter()
        began_stage = begun - self.position.seconds
        task = progress.task(run.name, self.num_steps, unit="steps")
        task.update(done=self.position.step)
        epochs = range(self.position.epoch, run.stage.epochs)
        groups = self.loader.steps(epochs, self.position.epoch_step, self.should_stop)
        settings = config.model_dump(mode="json") | {"stage": run.name, "decoder": run.decoder}
        trackers, main = config.logging.trackers, self.accelerator.is_main_process
        with metrics_log(run.output, trackers, self.position.step, settings, enabled=main) as write, closing(groups):
            while self.position.step < self.num_steps:
                before = time.perf_counter()
                group = self._next_group(groups)
                waiting.append(time.perf_counter() - before)
                totals = self._totals(group)
                losses = self._step(group, totals)
                self._advance(losses, time.perf_counter() - began_stage)
                step, samples, seconds = self.position.step, self.position.samples, self.position.seconds
                if step % config.logging.every == 0 or step == self.num_steps:
                    write(step, {**losses, "samples": samples, "seconds": seconds})
                terms = [f"{name} {losses[name]:.3f}" for name in ("lm", "kd", "attention") if name in losses]
                speed = f"on average {samples / max(seconds, 1e-9):,.1f} samples/s"
                rate = f"learning rate {losses['learning_rate']:.2g}"
                task.update(done=step, note=", ".join([f"in step {step} {terms[0]}", *terms[1:], rate, speed]))
                # Also after the last step, so that no step is repeated if saving the student fails.
                if step % config.checkpoint.every == 0 or step == self.num_steps:
                    self.checkpoints.save(self.position, self.state)
        first_batch_s, *later = waiting or [0.0]
        since = time.perf_counter() - begun - first_batch_s
        return self._finish(first_batch_s, sum(later) / max(since, 1e-9))

    def _next_group(self, groups: Iterator[list[Batch]]) -> list[Batch]:
        """The microbatches of one optimizer step; fewer at an epoch's end."""
        try:
            return next(groups)
        except StoppedWaiting:
            return []
        except LoaderDied:
            if not self.should_stop():
                raise
            # A launcher that stops the job may stop its loader processes first.
            return []

    def _step(self, group: list[Batch], totals: BatchTotals) -> dict[str, float]:
        """One optimizer step; returns each loss term of the global batch, and the rate and norm it was taken with."""
        # Dropout depends on the number of the step alone, whatever ran before it in this process.
        address = (self.run.config.seed, self.position.step, self.accelerator.process_index)
        torch.manual_seed(int(np.random.SeedSequence(address).generate_state(1, np.uint64)[0]))
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
        norm = float(clip_gradients(self.trained.values(), self.run.config.max_grad_norm))
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
        return {**dict(zip(["loss", *terms], summed, strict=True)), "learning_rate": rate, "grad_norm": norm}

    def _totals(self, group: list[Batch]) -> BatchTotals:
        """Counts of the global batch. The request to stop is summed with them, so that all processes stop at one step.

        Raises:
            TrainingStopped: In all processes, after a checkpoint.
        """
        rows, images = sum(len(b.answers) for b in group), sum(b.num_with_image for b in group)
        samples = sum(len(b.keys) for b in group)
        counts = torch.tensor([rows, images, samples, self.should_stop()], device=self.accelerator.device)
        rows, images, self.samples_in_step, stop = self.accelerator.reduce(counts, reduction="sum").tolist()
        if stop:
            self.checkpoints.save(self.position, self.state)
            raise TrainingStopped(self.run.name, self.position.step)
        return BatchTotals(rows, images)

    def _advance(self, losses: dict[str, float], seconds: float) -> None:
        now = self.position
        if now.step >= self.num_steps - max(1, self.num_steps // 10):
            terms = {name: value for name, value in losses.items() if name not in ("learning_rate", "grad_norm")}
            sums = {name: now.loss_sums.get(name, 0.0) + value for name, value in terms.items()}
            now = replace(now, loss_sums=sums, num_summed=now.num_summed + 1)
        ended, epoch_step = divmod(now.epoch_step + 1, self.steps_per_epoch)
        now = replace(now, epoch=now.epoch + ended, epoch_step=epoch_step, seconds=seconds)
        self.position = replace(now, step=now.step + 1, samples=now.samples + self.samples_in_step)

    def _finish(self, first_batch_s: float, wait_share: float) -> StageReport:
        run = self.run
        report = StageReport(
            stage=run.name,
            steps=self.position.step,
            samples=self.position.samples,
            trained_parameters=sum(p.numel() for p in self.trained.values()),
            seconds=self.position.seconds,
            samples_per_s=self.position.samples / max(self.position.seconds, 1e-9),
            first_batch_s=first_batch_s,
            wait_share=wait_share,
            losses={name: value / self.position.num_summed for name, value in self.position.loss_sums.items()},
            notes=tuple(self.setup.notes),
        )
        trained = gathered(trained_parameters(self.student), wanted=self.accelerator.is_main_process)
        if self.accelerator.is_main_process:
            # The student that the stage started from with what was trained: in float32, with plain sdpa, LoRA merged.
            student, peft = self.setup.load()
            load_trained(student, trained)
            student = student if peft is None else peft.merge_and_unload()
            with disk_errors_named(run.folder.student), open_store(run.output).new_tree(STUDENT) as folder:
                student.save_pretrained(folder)
                self.setup.processor.save_pretrained(folder)
            run.folder.finish(report)
        self.accelerator.wait_for_everyone()
        return report
