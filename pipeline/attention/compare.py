"""Compares the attention of a teacher and of students on the same samples."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from pipeline.attention.report import AttentionReport, StudentAttention
from pipeline.attention.teacher_side import TeacherSide, open_teacher
from pipeline.attention_comparison import OpenedStudent, first_samples, open_student, similarity_of
from pipeline.checkpoints import find_checkpoint
from stages.checkpoints.weights import weights_digest
from stages.evaluation.attention.answers import AnswersSplit, split_by_answers
from stages.evaluation.attention.measures import mean_estimate
from stages.evaluation.attention.objects import ObjectFile
from stages.evaluation.attention.observe import observe_model, stored_answer_rows
from stages.evaluation.attention.suite_folders import read_run, suite_folders
from stages.evaluation.attention.tally import Kinds, LayerTally
from stages.evaluation.attention.token_boxes import cell_boxes, token_boxes
from stages.evaluation.attention.token_kinds import token_kinds
from stages.evaluation.attention.words import chosen_rows
from stages.evaluation.result import SuiteRun
from stages.images import decode_image
from stages.student.data.collator import Collator
from storage.errors import UserError
from storage.progress import SILENT, Progress
from storage.streaming.stream import StreamedSample
from storage.targets.store import TargetStore

ANSWER = "answer"
"""As `text`: all rows of the answers."""


@dataclass(frozen=True)
class AttentionRequest:
    """What is compared.

    Attributes:
        students: Checkpoint or training run by shown name.
        samples: Sample shards.
        targets: Target store; None looks at the teacher alone.
        limit: Samples, the first ones.
        teacher: Checkpoint that is run on them; None takes the stored maps.
        text: `answer`, or a word of answers whose attention to the image is wanted.
        objects: Where objects are.
        answers: Of each student folders of `cdp evaluate`.
    """

    students: Mapping[str, str]
    samples: str
    targets: str | None
    limit: int = 64
    teacher: str | None = None
    text: str | None = None
    objects: ObjectFile | None = None
    answers: Mapping[str, Sequence[Path]] = field(default_factory=dict)

    @property
    def word(self) -> str | None:
        """The word; None for all rows of the answers."""
        return None if self.text == ANSWER else self.text


@dataclass
class _Known:
    """What the pass over the teacher leaves for those over students, by the sample's key."""

    images: dict[str, str] = field(default_factory=dict)
    """sha256 of the first image."""
    kinds: dict[str, Kinds] = field(default_factory=dict)
    texts: dict[str, Tensor] = field(default_factory=dict)
    """The teacher's rows of text, for each of its layers."""
    without_image: int = 0
    with_text: set[str] = field(default_factory=set)
    """Samples that have the rows of text asked for."""


def compare_models(request: AttentionRequest, progress: Progress = SILENT) -> AttentionReport:
    """Looks at the teacher, then at each student beside it.

    Raises:
        UserError: If one of them cannot be compared, answers are of another model, or no sample has what was asked for.
    """
    store = None if request.targets is None else TargetStore.open(request.targets)
    folders = {name: _folders_of(name, request) for name in request.students}
    side, known = open_teacher(store, request.teacher), _Known()
    teacher = _look_at_teacher(side, request, known, progress)
    _refuse_nothing(request, known, teacher)
    students = {}
    for name, model in request.students.items():
        assert store is not None
        students[name] = _look_at_student(name, open_student(model, store), request, known, folders[name], progress)
    return AttentionReport(
        num_samples=len(known.images),
        num_images=len(set(known.images.values())),
        num_without_image=known.without_image,
        text=request.text,
        num_with_text=len(known.with_text),
        num_images_with_text=len({known.images[key] for key in known.with_text}),
        num_object_pictures=0 if request.objects is None else len(request.objects),
        num_with_objects=len(known.kinds),
        teacher_is_live=request.teacher is not None,
        teacher=teacher.result(),
        students=students,
    )


def _look_at_teacher(side: TeacherSide, request: AttentionRequest, known: _Known, progress: Progress) -> LayerTally:
    is_live = request.text is not None and side.teacher is not None
    is_stored = request.text == ANSWER and side.stores_answers
    tally = LayerTally(side.windows, with_objects=request.objects is not None, with_text=is_live or is_stored)
    num_samples = request.limit if side.store is None else min(request.limit, side.store.num_samples)
    collate, task = Collator(side.reader), progress.task("look at the teacher", num_samples)
    with closing(side.samples(request.samples, request.limit, progress)) as batches:
        for samples in batches:
            batch = collate(samples)
            rows = chosen_rows(side.reader.processor.tokenizer, batch, request.word) if is_live else None
            for sample, seen in zip(samples, side.observe(batch, rows), strict=True):
                if seen is None:
                    known.without_image += 1
                    continue
                known.images[sample.key] = hashlib.sha256(sample.images[0]).hexdigest()
                if is_stored:
                    seen = replace(seen, text_WN=stored_answer_rows(sample.targets))
                if (kinds := _kinds_of(sample, side, request.objects)) is not None:
                    known.kinds[sample.key] = kinds
                if seen.text_WN is not None:
                    known.texts[sample.key] = seen.text_WN
                    known.with_text.add(sample.key)
                tally.add(known.images[sample.key], seen, kinds)
            task.advance(len(samples))
    return tally


def _look_at_student(
    name: str,
    opened: OpenedStudent,
    request: AttentionRequest,
    known: _Known,
    folders: Sequence[tuple[SuiteRun, Path]],
    progress: Progress,
) -> StudentAttention:
    for note in opened.notes:
        progress.message(f"note: {note}")
    assert request.targets is not None
    store = TargetStore.open(request.targets)
    of_samples: dict[str, tuple[float, ...]] = {}
    task = progress.task(f"compare {name}", min(request.limit, store.num_samples))
    similarity = similarity_of(opened, request.samples, store, request.limit, task, of_samples)
    images = [known.images[key] for key in of_samples]
    layers = tuple((layer,) for layer in opened.matching.student_layers)
    tally = LayerTally(layers, with_objects=request.objects is not None, with_text=request.text is not None)
    task = progress.task(f"look at {name}", min(request.limit, store.num_samples))
    with closing(first_samples(request.samples, store, request.limit)) as batches:
        for samples in batches:
            _add_student(tally, opened, samples, request, known)
            task.advance(len(samples))
    if request.text is not None and not tally.num_with_text:
        raise _without_word(request, len(images))
    return StudentAttention(
        similarity=similarity,
        intervals=tuple(mean_estimate(column, images) for column in zip(*of_samples.values(), strict=True)),
        mean=mean_estimate([sum(values) / len(values) for values in of_samples.values()], images),
        measures=tally.result(with_similarity=bool(known.texts)),
        answers=_splits(folders, of_samples, known.images),
        samples=of_samples,
    )


def _add_student(
    tally: LayerTally,
    opened: OpenedStudent,
    samples: Sequence[StreamedSample],
    request: AttentionRequest,
    known: _Known,
) -> None:
    student, matching = opened.student, opened.matching
    batch = opened.collator(samples)
    rows = None
    if request.text is not None:
        rows = chosen_rows(opened.collator.reader.processor.tokenizer, batch, request.word)
    moved = batch.to(student.device, student.dtype)
    observations = observe_model(student, moved.inputs, batch.image_positions, tally.windows, rows, batch.cells)
    for key, seen in zip(batch.keys, observations, strict=True):
        if seen is None or key not in known.images:
            continue
        if seen.text_WN is not None:
            known.with_text.add(key)
        teacher_WN = None
        if key in known.texts:
            row_of = {layer: row for row, layer in enumerate(matching.captured_layers)}
            of_windows = [known.texts[key][[row_of[layer] for layer in window]].mean(0) for window in matching.windows]
            teacher_WN = torch.stack(of_windows)
        tally.add(known.images[key], seen, known.kinds.get(key), teacher_WN)


def _kinds_of(sample: StreamedSample, side: TeacherSide, objects: ObjectFile | None) -> Kinds | None:
    """Which image tokens show objects; None for several images, or where the objects given do not name its picture."""
    if objects is None or len(sample.images) != 1:
        return None
    places = objects.of(sample.key, sample.record, sample.images[0])
    if places is None:
        return None
    image = decode_image(sample.images[0], exif=side.reader.images.exif)
    boxes_N4 = token_boxes(side.reader.family, side.reader.processor, side.reader(sample), image)
    return token_kinds(cell_boxes(boxes_N4, sample.targets.cells_X), places)


def _refuse_nothing(request: AttentionRequest, known: _Known, teacher: LayerTally) -> None:
    if not known.images:
        raise UserError(f"none of the first {request.limit} samples has an image; raise --limit")
    if request.objects is not None and not known.kinds:
        raise UserError(
            f"none of {len(known.images)} samples has one of the {len(request.objects):,} pictures that the objects "
            "name; name samples by key or id, pictures as the records do, or by the sha256 of their files"
        )
    if request.teacher is not None and request.word is not None and not known.texts:
        raise _without_word(request, len(known.images))


def _without_word(request: AttentionRequest, num_samples: int) -> UserError:
    return UserError(f"no answer of {num_samples} samples holds {request.text!r} as a word; choose another")


def _folders_of(name: str, request: AttentionRequest) -> list[tuple[SuiteRun, Path]]:
    """The runs of suites that a student answered, with their folders; refuses answers of another model."""
    found = [folder for each in request.answers.get(name, ()) for folder in suite_folders(each)]
    if not found:
        return []
    weights = weights_digest(find_checkpoint(request.students[name]))
    runs = [(read_run(folder), folder) for folder in found]
    for run, folder in runs:
        if run.weights != weights:
            raise UserError(
                f"{folder} holds answers of a model with weights {run.weights[:12]} ({run.model}), {name} has "
                f"{weights[:12]}; name the answers of this student"
            )
    return runs


def _splits(
    folders: Sequence[tuple[SuiteRun, Path]], of_samples: Mapping[str, tuple[float, ...]], images: Mapping[str, str]
) -> tuple[AnswersSplit, ...]:
    by_image: dict[str, list[tuple[float, ...]]] = {}
    for key, values in of_samples.items():
        by_image.setdefault(images[key], []).append(values)
    return tuple(split_by_answers(folder, run, by_image) for run, folder in folders)
