"""The training loop of one stage: stream, step, log, checkpoint, resume."""

import logging
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from stages.attention.capture import enable_capture
from stages.student.data.batch import Batch
from stages.student.data.loader import StepLoader, StoppedWaiting, next_group
from stages.student.model.student import decoder_of
from stages.student.model.trainable import keep_frozen_in
from stages.student.run_folder import STUDENT, StageReport, ValidationReport
from stages.student.training.checkpoint import Checkpoints, TrainerState, load_trained, trained_parameters
from stages.student.training.metrics import Write, metrics_log
from stages.student.training.objective import TERMS, BatchTotals, GlobalStep, refuse_not_finite
from stages.student.training.parallel import clip_gradients, gathered, gradients_stay, spread
from stages.student.training.rank_consistency import check_same_folder, check_same_position
from stages.student.training.resume_guard import check_resumable, record_stage
from stages.student.training.setup import StageSetup, notes_of_compared
from stages.student.training.stage_run import StageRun, TrainingStopped
from stages.student.training.validation import Validation
from storage.errors import disk_errors_named
from storage.progress import SILENT, Progress, ProgressTask
from storage.stores import open_store
from storage.streaming.stream import Mixture

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
        self.loader = self._loader(setup.mixture)
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
        objective = run.objective(self.student, stage, logits, setup.matching, setup.shared)
        self.validation: Validation | None = None
        if setup.held_out is not None:
            self.validation = Validation(objective, self._loader(setup.held_out), accelerator, should_stop)
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
            # Here where the stage was stopped while it measured.
            self._validate(write, task, progress)
            while self.position.step < self.num_steps:
                before = time.perf_counter()
                group = next_group(groups, self.should_stop)
                waiting.append(time.perf_counter() - before)
                counted = self._counted(group)
                losses = self._step(group, counted.totals)
                self._advance(losses, counted, time.perf_counter() - began_stage)
                step, samples, seconds = self.position.step, self.position.samples, self.position.seconds
                if step % config.logging.every == 0 or step == self.num_steps:
                    write(step, {**losses, "samples": samples, "seconds": seconds})
                self._validate(write, task, progress)
                task.update(done=step, note=self._note(losses))
                # Also after the last step, so that no step is repeated if saving the student fails.
                if step % config.checkpoint.every == 0 or step == self.num_steps:
                    self.checkpoints.save(self.position, self.state)
        first_batch_s, *later = waiting or [0.0]
        since = time.perf_counter() - begun - first_batch_s
        return self._finish(first_batch_s, sum(later) / max(since, 1e-9))

    def _loader(self, mixture: Mixture) -> StepLoader:
        """The parts of a mixture's steps that this process gets."""
        return StepLoader(
            mixture,
            self.setup.collator,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            device=self.accelerator.device,
            config=self.run.config.loader,
            with_maps=self.run.stage.attention_weight > 0,
            with_answers=self.run.stage.answer_attention_weight > 0,
        )

    def _note(self, losses: dict[str, float]) -> str:
        """What is shown beside the number of steps."""
        now = self.position
        parts = [f"in step {now.step} {_terms_text(losses)}", f"learning rate {losses['learning_rate']:.2g}"]
        if now.validated_step:
            parts.insert(1, f"validation after step {now.validated_step} {_terms_text(now.validation)}")
        return ", ".join([*parts, f"on average {now.samples / max(now.seconds, 1e-9):,.1f} samples/s"])

    def _validate(self, write: Write, task: ProgressTask, progress: Progress) -> None:
        """Measures the losses on the held-out samples if that is due after this step and was not done.

        Raises:
            TrainingStopped: In all processes, after a checkpoint; the stage measures when it goes on.
        """
        validation, step = self.validation, self.position.step
        due = step and (step % self.run.config.validation.every == 0 or step == self.num_steps)
        if validation is None or not due or self.position.validated_step == step:
            return
        begun, total = time.perf_counter(), f"{validation.num_samples:,} held-out samples"
        try:
            losses = validation.losses(step, lambda done: task.update(note=f"validation: {done:,} of {total}"))
        except StoppedWaiting:
            raise self._stopped() from None
        seconds, before = time.perf_counter() - begun, self.position
        self.position = replace(
            before,
            validation=losses,
            validated_step=step,
            validation_seconds=before.validation_seconds + seconds,
            seconds=before.seconds + seconds,
        )
        write(step, {f"validation/{name}": value for name, value in {**losses, "seconds": seconds}.items()})
        said = f"validation after step {step:,}: {_terms_text(losses)}, in all {losses['loss']:.3f}"
        progress.message(f"{self.run.name}: {said} ({total}, {seconds:.1f} s)")

    def _stopped(self) -> TrainingStopped:
        """Saves a checkpoint in all processes; gives what says so."""
        self.checkpoints.save(self.position, self.state)
        return TrainingStopped(self.run.name, self.position.step)

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
        refuse_not_finite({"loss": summed[0], "gradient": norm}, self.position.step + 1, group)
        rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return {**dict(zip(["loss", *terms], summed, strict=True)), "learning_rate": rate, "grad_norm": norm}

    def _counted(self, group: list[Batch]) -> GlobalStep:
        """Counts of the global batch.

        Raises:
            TrainingStopped: In all processes, after a checkpoint, if one of them was asked to stop.
        """
        found = GlobalStep.of(group, self.accelerator, stop=self.should_stop())
        if found.is_stopped:
            raise self._stopped()
        return found

    def _advance(self, losses: dict[str, float], counted: GlobalStep, seconds: float) -> None:
        now = self.position
        if now.step >= self.num_steps - max(1, self.num_steps // 10):
            terms = {name: value for name, value in losses.items() if name not in ("learning_rate", "grad_norm")}
            sums = {name: now.loss_sums.get(name, 0.0) + value for name, value in terms.items()}
            now = replace(now, loss_sums=sums, num_summed=now.num_summed + 1)
        ended, epoch_step = divmod(now.epoch_step + 1, self.steps_per_epoch)
        now = replace(now, epoch=now.epoch + ended, epoch_step=epoch_step, seconds=seconds)
        rows, kd_rows = counted.totals.answer_rows, counted.totals.kd_rows
        self.position = now.after_step(counted.num_samples, rows, kd_rows, counted.num_uncompared)

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
            validation=self._validation_report(),
            notes=(*self.setup.notes, *notes_of_compared(run.stage, self.position)),
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

    def _validation_report(self) -> ValidationReport | None:
        if self.validation is None:
            return None
        now = self.position
        share = now.validation_seconds / max(now.seconds, 1e-9)
        return ValidationReport(samples=self.validation.num_samples, losses=now.validation, time_share=share)


def _terms_text(losses: dict[str, float]) -> str:
    """The loss terms for people, those that the stage has."""
    return ", ".join(f"{name} {losses[name]:.3f}" for name in TERMS if name in losses)
