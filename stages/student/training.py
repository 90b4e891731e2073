"""The training loop of one stage: stream, step, log, checkpoint, resume."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

from stages.attention import enable_capture
from stages.checkpoints import load_processor
from stages.families import family_of
from stages.student.batches import Batch, Collator
from stages.student.build import Student, build_student, load_student
from stages.student.checkpoint import Position, list_checkpoints, load_checkpoint, save_checkpoint
from stages.student.claim import claim_output
from stages.student.matching import match_layers
from stages.student.metrics import MetricsLog
from stages.student.objective import BatchTotals, DistillationObjective
from stages.student.stage import StageReport, StageRun, StepProgress
from stages.student.tokens import check_same_tokens
from stages.student.trainable import merge_lora, prepare_for_stage
from storage.errors import UserError
from storage.stores import open_store
from storage.stream import StreamConfig, num_steps, shard_sizes, target_stream

logger = logging.getLogger(__name__)


def train_stage(
    run: StageRun, accelerator: Accelerator, progress: Callable[[StepProgress], None] | None = None
) -> StageReport:
    """Trains one stage, from its newest whole checkpoint when there is one; a finished stage is not run again.

    Leaves `student/` (a Hugging Face folder, LoRA merged), `checkpoints/`, `metrics.jsonl` and `report.json`.

    Raises:
        UserError: the folder holds the same stage with other settings, the student does not fit the targets, or the
            loss is no longer finite.
    """
    claim_output(run)
    report_path = run.output / "report.json"
    if report_path.is_file():
        return StageReport.model_validate_json(report_path.read_text())
    with torch.random.fork_rng(devices=[]):
        # Dropout draws from torch's own generator; seeded, it draws the same whatever ran before in this process.
        torch.manual_seed(run.config.seed)
        return _StageLoop(run, accelerator, progress).run()


class _StageLoop:
    """State of one running stage."""

    def __init__(
        self, run: StageRun, accelerator: Accelerator, progress: Callable[[StepProgress], None] | None
    ) -> None:
        self.run_config, self.accelerator, self.progress = run, accelerator, progress
        config, stage = run.config, run.stage
        teacher_folder = run.targets.teacher_folder()
        _check_temperature(run)
        self.student = _load(run, teacher_folder)
        self.peft = prepare_for_stage(self.student, stage, config.lora, config.seed)
        enable_capture(self.student)
        self.notes: list[str] = []
        matching = None
        if stage.attention_weight > 0:
            depth = self.student.config.text_config.num_hidden_layers
            fingerprint = run.targets.manifest.fingerprint
            matching, self.notes = match_layers(depth, fingerprint, config.student_layers, config.num_matched)
        if accelerator.is_main_process:
            # Now, and not only in the report: what they say may be a reason to stop.
            for note in self.notes:
                logger.warning("%s: %s", run.name, note)
        self.collator = Collator(
            load_processor(teacher_folder),
            self.student.config.image_token_id,
            self.student.config.text_config.vocab_size,
            family_of(str(run.targets.manifest.fingerprint.teacher_config["model_type"])),
        )
        self.stream = StreamConfig(
            seed=config.seed, shuffle_shards=config.shuffle_shards, batch_size=config.microbatch_size
        )
        ranks = accelerator.num_processes
        if stage.batch_size % (config.microbatch_size * ranks):
            raise UserError(
                f"batch_size {stage.batch_size} of {run.name} is no multiple of microbatch_size "
                f"{config.microbatch_size} x {ranks} processes; change one of them"
            )
        self.accumulation = stage.batch_size // (config.microbatch_size * ranks)
        self.batches_per_epoch = num_steps(shard_sizes(run.targets), config.microbatch_size, ranks)
        self.steps_per_epoch = -(-self.batches_per_epoch // self.accumulation)
        self.num_steps = min(stage.epochs * self.steps_per_epoch, stage.max_steps or 2**62)

        objective = DistillationObjective(self.student, stage, run.targets.manifest.fingerprint.logit_codec, matching)
        self.trained = [p for p in objective.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(self.trained, lr=stage.learning_rate, weight_decay=0.0)
        self.scheduler = get_cosine_schedule_with_warmup(
            optimizer, round(stage.warmup_ratio * self.num_steps), self.num_steps
        )
        self.position = Position()
        self.checkpoints = run.output / "checkpoints"
        if saved := list_checkpoints(self.checkpoints):
            self.position = load_checkpoint(saved[-1], self.student, optimizer, self.scheduler)
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)

    def run(self) -> StageReport:
        """Trains to the last step and saves the student."""
        run, config = self.run_config, self.run_config.config
        recent: list[dict[str, float]] = []
        waited = 0.0
        self.student.train()
        started = time.perf_counter() - self.position.seconds
        batches = self._batches()
        with closing(MetricsLog(run.output, enabled=self.accelerator.is_main_process)) as log:
            while self.position.step < self.num_steps:
                before = time.perf_counter()
                group = self._next_group(batches)
                waited += time.perf_counter() - before
                losses = self._step(group)
                self._advance(time.perf_counter() - started)
                recent = [*recent, losses][-max(1, self.num_steps // 10) :]
                step = self.position.step
                if step % config.log_every == 0 or step == self.num_steps:
                    log.write(step, {**losses, "samples": self.position.samples, "seconds": self.position.seconds})
                if self.progress is not None:
                    self.progress(StepProgress(step, self.num_steps, self.position.samples, losses))
                if step % config.checkpoint_every == 0 and step < self.num_steps and self.accelerator.is_main_process:
                    save_checkpoint(
                        self.checkpoints,
                        self.position,
                        self.student,
                        self.optimizer,
                        self.scheduler,
                        config.keep_checkpoints,
                    )
        return self._finish(recent, waited)

    def _batches(self) -> Iterator[Batch]:
        """Microbatches of this rank from the current position on, over all remaining epochs."""
        run = self.run_config
        start = self.position.epoch_step * self.accumulation
        with_maps = run.stage.attention_weight > 0
        for epoch in range(self.position.epoch, run.stage.epochs):
            stream = target_stream(
                run.samples,
                run.targets,
                self.stream,
                rank=self.accelerator.process_index,
                world_size=self.accelerator.num_processes,
                epoch=epoch,
                start_batch=start,
                with_maps=with_maps,
            )
            # Not prepared by accelerate, which would deal the stream out a second time.
            yield from DataLoader(
                stream,
                batch_size=None,
                collate_fn=self.collator,
                num_workers=run.config.num_workers,
                multiprocessing_context=self._worker_context(),
                # Without its own it draws from the generator of dropout, once more after each resume.
                generator=torch.Generator().manual_seed(run.config.seed),
            )
            start = 0

    def _worker_context(self) -> str | None:
        """Object stores cannot be used in a forked worker once this process has opened one."""
        run = self.run_config
        remote = "://" in run.samples.url or "://" in run.targets.store.url
        return "spawn" if remote and run.config.num_workers else None

    def _next_group(self, batches: Iterator[Batch]) -> list[Batch]:
        """The microbatches of one optimizer step; fewer at an epoch's end."""
        count = min(self.accumulation, self.batches_per_epoch - self.position.epoch_step * self.accumulation)
        group = [next(batches) for _ in range(count)]
        dtype = self.student.dtype
        return [batch.to(self.accelerator.device, dtype) for batch in group]

    def _step(self, group: list[Batch]) -> dict[str, float]:
        """One optimizer step; returns each loss term of the global batch, and the rate and norm it was taken with."""
        totals = self._totals(group)
        terms: dict[str, Tensor] = {}
        total_loss = torch.zeros((), device=self.accelerator.device)
        for index, batch in enumerate(group):
            with self.accelerator.no_sync(self.objective) if index < len(group) - 1 else nullcontext():
                with self.accelerator.autocast():
                    loss, shares = self.objective(batch, totals)
                # DDP averages gradients over ranks, but the shares already sum to the global mean.
                self.accelerator.backward(loss * self.accelerator.num_processes)
            total_loss += loss.detach()
            for name, value in shares.items():
                terms[name] = terms.get(name, torch.zeros_like(value)) + value
        norm = self.accelerator.clip_grad_norm_(self.trained, self.run_config.config.max_grad_norm)
        assert norm is not None
        for name, value in (("loss", total_loss), ("gradient", norm)):
            if not bool(torch.isfinite(value)):
                keys = ", ".join(key for batch in group for key in batch.keys)
                raise UserError(
                    f"the {name} is {value.item()} at step {self.position.step + 1}; the batch holds samples {keys}. "
                    "Lower the learning rate, or look at these samples"
                )
        rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        summed = self.accelerator.reduce(torch.stack([total_loss, *terms.values()]), reduction="sum").tolist()
        names = ["loss", *terms]
        return {**dict(zip(names, summed, strict=True)), "learning_rate": rate, "grad_norm": float(norm)}

    def _totals(self, group: list[Batch]) -> BatchTotals:
        counts = torch.tensor(
            [
                sum(b.num_answer_rows for b in group),
                sum(b.num_with_image for b in group),
                sum(len(b.keys) for b in group),
            ],
            device=self.accelerator.device,
        )
        rows, images, self.samples_in_step = self.accelerator.reduce(counts, reduction="sum").tolist()
        return BatchTotals(rows, images)

    def _advance(self, seconds: float) -> None:
        position = self.position
        epoch, epoch_step = position.epoch, position.epoch_step + 1
        if epoch_step == self.steps_per_epoch:
            epoch, epoch_step = epoch + 1, 0
        self.position = Position(position.step + 1, epoch, epoch_step, position.samples + self.samples_in_step, seconds)

    def _finish(self, recent: list[dict[str, float]], waited: float) -> StageReport:
        run = self.run_config
        names = [name for name in (recent[-1] if recent else {}) if name not in ("learning_rate", "grad_norm")]
        report = StageReport(
            stage=run.name,
            steps=self.position.step,
            samples=self.position.samples,
            trained_parameters=sum(p.numel() for p in self.trained),
            seconds=self.position.seconds,
            samples_per_s=self.position.samples / max(self.position.seconds, 1e-9),
            wait_share=waited / max(self.position.seconds, 1e-9),
            losses={name: sum(step[name] for step in recent) / len(recent) for name in names},
            notes=self.notes,
        )
        if self.accelerator.is_main_process:
            self._save_student()
            open_store(run.output).write("report.json", report.model_dump_json(indent=1).encode())
        self.accelerator.wait_for_everyone()
        return report

    def _save_student(self) -> None:
        run = self.run_config
        student = merge_lora(self.peft, self.student)
        # The capturing attention lives in this process only; a saved student starts with plain sdpa.
        student.set_attn_implementation("sdpa")
        staging = run.output / "student.partial"
        student.save_pretrained(staging)
        load_processor(run.targets.teacher_folder()).save_pretrained(staging)
        open_store(run.output).put_tree(staging, "student")


def _check_temperature(run: StageRun) -> None:
    codec, wanted = run.targets.manifest.fingerprint.logit_codec, run.stage.kd_temperature
    if run.stage.kd_weight > 0 and not codec.serves(wanted):
        raise UserError(
            f"kd_temperature of {run.name} is {wanted}, but {run.targets.store.url} holds what a student needs at "
            f"{[1.0, *codec.temperatures]} only; choose one of them, or extract again with it in teacher.temperatures"
        )


def _load(run: StageRun, teacher_folder: Path) -> Student:
    if run.initial is not None:
        check_same_tokens(load_processor(teacher_folder), run.initial)
        return load_student(run.initial)
    return build_student(teacher_folder, run.decoder, run.config.seed)
