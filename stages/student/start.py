"""What a stage starts from: which checkpoint, how it reads the stored samples, what of it learns."""

from dataclasses import replace
from pathlib import Path

from peft import PeftModel
from transformers import ProcessorMixin

from stages.checkpoints import resolve_checkpoint
from stages.student.build import Student, build_student, is_student, load_student
from stages.student.collator import Collator
from stages.student.eyes import check_eyes
from stages.student.reading import check_first_samples, open_reading
from stages.student.stage import StageRun
from stages.student.trainable import prepare_for_stage


class StudentStart:
    """A stage's student, known from its folder before any weights are loaded.

    Args:
        run: the stage.

    Raises:
        UserError: the student cannot read the store's samples, or cannot be of the kind that is asked for.
        FingerprintMismatch: it was built for another teacher.
    """

    def __init__(self, run: StageRun) -> None:
        self._run = run
        self._own_eyes = run.config.adapter == "own"
        self._folder: Path = run.initial or resolve_checkpoint(run.decoder)
        reading = open_reading(run.targets, self._folder, own_eyes=self._own_eyes, kd_weight=run.stage.kd_weight)
        if reading.max_length is not None:
            # Stores of one mixture may differ in it; each of their samples fits into the longest.
            lengths = [source.targets.manifest.fingerprint.max_length for source in run.sources]
            reading = replace(reading, max_length=max(lengths))
        self._reading = reading
        self._saved = run.initial is not None or is_student(self._folder)
        if self._saved and not self._own_eyes:
            check_eyes(self._folder, run.targets.teacher_folder())

    @property
    def processor(self) -> ProcessorMixin:
        """What is saved with the student."""
        return self._reading.processor

    @property
    def notes(self) -> list[str]:
        """For the user."""
        return list(self._reading.notes)

    def collator(self) -> Collator:
        """Reads the store's samples as this student does.

        Raises:
            UserError: one of the first samples has another number of image tokens for the student.
        """
        reading = self._reading
        if reading.own_eyes or reading.max_length is not None:
            for source in self._run.sources:
                check_first_samples(source, reading)
        return Collator(reading.reader())

    def load(self) -> tuple[Student, PeftModel | None]:
        """The student with what the stage trains of it, and the wrapper of its LoRA updates if it has any."""
        run = self._run
        if self._saved or self._own_eyes:
            student = load_student(self._folder)
        else:
            student = build_student(
                run.targets.teacher_folder(),
                self._folder,
                run.config.seed,
                image_token_id=self._reading.image_token_id,
            )
        own_adapter = run.config.own_adapter == "trained"
        return student, prepare_for_stage(student, run.stage, run.config.lora, run.config.seed, own_adapter=own_adapter)
