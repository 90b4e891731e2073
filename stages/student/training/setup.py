"""What a stage starts from: which checkpoint, how it reads the stored samples, what of it learns."""

from dataclasses import replace
from pathlib import Path

from peft import PeftModel

from stages.attention.capturable_layers import check_maps, layers_with_maps
from stages.checkpoints.configs import load_config
from stages.checkpoints.image_settings import note_image_settings
from stages.checkpoints.resolve import resolve_student
from stages.conversations.answer_ends import notes_of_ends
from stages.student.data.collator import Collator
from stages.student.data.sample_reader import (
    FIRST_SAMPLES,
    ReaderSpec,
    check_first_samples,
    resolve_reader_spec,
)
from stages.student.layer_matching import WITHOUT_MAPS, LayerMatching, match_layers
from stages.student.losses.across_tokenizers import SharedTokens
from stages.student.model.build import build_student, check_vision_tower
from stages.student.model.loading import check_weights, load_student
from stages.student.model.rotary_section import position_settings
from stages.student.model.student import Student
from stages.student.model.trainable import prepare_for_stage
from stages.student.stage_config import StageConfig
from stages.student.store_check import check_answers, check_temperature
from stages.student.student_kind import is_student
from stages.student.training.checkpoint import Position
from stages.student.training.stage_run import StageRun
from stages.tempered_noise import noise_notes
from storage.streaming.stream import Mixture, Source


class StageSetup:
    """A stage's student and what it trains on, known before any weights are loaded and anything is written.

    Attributes:
        mixture: the samples that the stage is trained on.
        held_out: those that it is not trained on, to measure the loss; None without any.
        collator: reads them as this student does.
        processor: what is saved with the student.
        matching: layers that learn from the teacher's maps; None without the attention loss.
        shared: tokens of both tokenizers; None where their logits are not compared.
        notes: for the user.

    Raises:
        UserError: If the student cannot read the store's samples or is of another kind than asked for, if the targets
            are not complete or lack what a loss needs, or if the student's files lack weights or its layers give no
            attention maps.
        FingerprintMismatch: If the student was built for another teacher, or targets and samples do not match.
    """

    def __init__(self, run: StageRun) -> None:
        self._run = run
        self._own_vision = run.config.vision == "own"
        self._folder = resolve_student(run.initial or run.decoder)
        spec = resolve_reader_spec(
            run.targets,
            self._folder,
            own_vision=self._own_vision,
            kd_weight=run.stage.kd_weight,
            kd_alignment=run.stage.kd_alignment,
        )
        if spec.reader.reads_anew:
            # Stores of one mixture may differ in it; each of their samples fits into the longest.
            lengths = [source.targets.manifest.fingerprint.max_length for source in run.sources]
            spec = replace(spec, reader=replace(spec.reader, max_length=max(lengths)))
        self._spec = spec
        reader, self.processor = spec.reader, spec.reader.processor
        self._saved = run.initial is not None or is_student(self._folder)
        if self._saved and not self._own_vision:
            check_vision_tower(self._folder, spec.teacher_folder)
        self._teacher_positions, position_notes = _positions(run, spec, self._folder if self._saved else None)
        check_weights(self._folder, bare=not (self._saved or self._own_vision))
        check_temperature(run.name, run.stage, run.targets.store.url, run.targets.manifest.fingerprint)
        stores = [(source.targets.store.url, source.targets.manifest.fingerprint) for source in run.sources]
        check_answers(run.name, run.stage, stores)
        self.notes = [*spec.notes, *_notes_of_ends(run, spec), *notes_of_cuts(run), *notes_of_noise(run)]
        self.notes += position_notes
        self.matching: LayerMatching | None = None
        if run.stage.matches_layers:
            depth, sink_mask = spec.decoder.num_hidden_layers, run.stage.attention_sink_mask
            matching, able = run.config.matching, layers_with_maps(spec.decoder)
            found, notes = match_layers(depth, run.targets.manifest, matching, sink_mask=sink_mask, able=able)
            self.matching = found
            check_maps(str(self._folder), spec.decoder, found.student_layers, WITHOUT_MAPS)
            # They are about maps; values of answer attention are exact for any window.
            self.notes += notes if run.stage.attention_weight > 0 else []
        held_out = run.held_out
        self.mixture = Mixture(run.sources, run.stream, held_out)
        self.held_out = None if held_out is None else self.mixture.held_out()
        if reader.own_vision or reader.reads_anew:
            for source in run.sources:
                self.notes += _notes_of_rows(source, *check_first_samples(source, reader))
        self.shared: SharedTokens | None = None
        if reader.alignment is not None and run.stage.kd_alignment == "shared":
            num_ids = run.targets.manifest.fingerprint.logit_codec.vocab_size
            self.shared = reader.alignment.shared_tokens(num_ids, reader.vocab_size)
            self.notes.append(f"{self.shared.num_shared:,} of the teacher's {num_ids:,} tokens are the student's too")
        self.collator = Collator(reader)

    def load(self) -> tuple[Student, PeftModel | None]:
        """The student with what the stage trains of it, and the wrapper of its LoRA updates if it has any."""
        run = self._run
        if self._saved or self._own_vision:
            student = load_student(self._folder)
        else:
            image_id, teacher = self._spec.reader.image_token_id, run.targets.teacher_folder()
            seed, positions = run.config.seed, self._teacher_positions
            student = build_student(teacher, self._folder, seed, image_id, teacher_positions=positions)
        note_image_settings(student.config, self._spec.reader.images)
        own = run.config.projector == "trained"
        return student, prepare_for_stage(student, run.stage, run.config.lora, run.config.seed, own_projector=own)


def _positions(run: StageRun, spec: ReaderSpec, saved: Path | None) -> tuple[bool, tuple[str, ...]]:
    """Whether a new student has the teacher's positions; notes, if the stage's student has other ones than asked for.

    Raises:
        UserError: If its decoder cannot have them.
    """
    teacher, wanted = load_config(spec.teacher_folder), run.config.positions == "teacher"
    if run.config.vision == "own" or spec.reader.family.rotary_axes is None:
        return wanted, ()
    kinds = {False: "ordinary positions", True: "the teacher's 3D positions"}
    if saved is not None:
        found = load_config(saved).mrope_section is not None
        kept = f"{saved} has {kinds[found]} and keeps them; train.positions is for new students"
        return wanted, () if found == wanted else (kept,)
    begun = run.folder.begun_with()
    if begun is not None and "positions" not in begun.settings:
        went_on = f"{run.output} was begun before there was train.positions, and goes on with {kinds[False]}"
        return False, (went_on,) if wanted else ()
    if wanted:
        position_settings(teacher, spec.decoder, spec.reader.family, str(run.decoder))
    return wanted, ()


def _notes_of_rows(source: Source, num_compared: int, num_rows: int) -> tuple[str, ...]:
    """How much of a store's first samples is compared across tokenizers."""
    if not num_rows:
        return ()
    share = f"{num_compared:,} of {num_rows:,} answer rows ({num_compared / num_rows:.1%})"
    return (f"logits can be compared at {share} of the first samples of {source.targets.store.url}",)


def notes_of_compared(stage: StageConfig, trained: Position) -> tuple[str, ...]:
    """How much of a trained stage's answers was compared across tokenizers."""
    if not stage.aligns_tokenizers:
        return ()
    share = f"{trained.kd_rows:,} of {trained.answer_rows:,} ({trained.kd_rows / max(trained.answer_rows, 1):.1%})"
    none = f"{trained.uncompared:,} of {trained.samples:,} samples had none"
    return (f"answer rows whose logits were compared (kd_alignment {stage.kd_alignment}): {share}; {none}",)


def _notes_of_ends(run: StageRun, spec: ReaderSpec) -> tuple[str, ...]:
    """Whether the answers that the student reads have an end it can learn, whoever's tokens they are."""
    if spec.reader.reads_anew:
        template = f"the chat template that {run.decoder} reads with"
        remedy = "Put one that writes a token after each answer into its folder (chat_template.jinja)"
        return notes_of_ends(spec.reader.processor, spec.reader.image_token_id, template, remedy)
    template = f"the chat template that {run.targets.store.url} was made with"
    remedy = "Extract again with teacher.chat_template set to one that does"
    return notes_of_ends(spec.teacher_processor, spec.reader.stored_id, template, remedy)


def notes_of_cuts(run: StageRun) -> tuple[str, ...]:
    """What the samples of the stage's stores lost to `max_length`, from the commit records; nothing if none was cut."""
    stores = {source.targets.store.url: source.targets for source in run.sources}
    records = [record for targets in stores.values() for record in targets.commits.values()]
    if not (num_cut := sum(record.num_cut_samples for record in records)):
        return ()
    num_samples = sum(record.num_samples for record in records)
    num_lost = sum(record.num_cut_answer_tokens for record in records)
    num_tokens = num_lost + sum(record.num_answer_rows for record in records)
    found = f"{num_cut:,} of the {num_samples:,} samples with targets ({num_cut / num_samples:.1%}) were cut"
    return (f"{found} at teacher.max_length and lost {num_lost:,} answer tokens ({num_lost / num_tokens:.1%} of all)",)


def notes_of_noise(run: StageRun) -> tuple[str, ...]:
    """What tail samples do to the logit loss at the stage's temperature, from the first samples of the targets."""
    stage, targets = run.stage, run.targets
    if not stage.kd_weight or stage.kd_temperature == 1 or stage.kd_divergence != "forward" or not targets.commits:
        return ()
    shard = targets.shard(min(targets.commits))
    rows = range(min(len(shard), FIRST_SAMPLES))
    records = [shard.read(row, with_maps=False)[0].logits_RQ for row in rows]
    return noise_notes(targets.manifest.fingerprint.logit_codec, records, (stage.kd_temperature,))
