"""Evaluating checkpoints: finding the model, scoring it, comparing its attention with cached targets."""

from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from pipeline.ui.html_report import ReportSample
from stages.attention import enable_capture
from stages.captured_layers import check_maps
from stages.checkpoints import hide_loading_bars, load_processor, resolve_checkpoint
from stages.evaluation.attention_pictures import enlarged, overlay, pooled_attention
from stages.evaluation.attention_similarity import AttentionSimilarity, LayersFrom, attention_similarity
from stages.evaluation.evaluate import evaluate_pairs
from stages.evaluation.pairs import load_pairs
from stages.evaluation.report import EvaluationReport
from stages.evaluation.scoring import EvaluationConfig
from stages.images import decode_image
from stages.student.config import STAGES
from stages.student.data.batch import Collator
from stages.student.data.sample_reader import resolve_reader_spec
from stages.student.layer_matching import LayerMatching, MatchingConfig, match_layers
from stages.student.model.loading import load_multimodal, load_student
from stages.student.model.student import Student, is_student
from stages.student.run_folder import RunFolder, StageFolder
from storage.progress import SILENT, Progress
from storage.stores import open_store
from storage.streaming.stream import StreamConfig, StreamedSample, target_stream
from storage.targets.store import TargetStore

BATCH_SIZE = 16
LOOKED_AT = 8
"""Samples that are looked at for each picture: several may share an image."""


def find_checkpoint(model: str) -> Path:
    """The checkpoint folder: of a training run the last stage's student, else the folder or hub id itself."""
    run, stage = RunFolder(Path(model)), StageFolder(Path(model))
    if run.holds_stages:
        return run.last_student()
    return stage.student if (stage.student / "config.json").is_file() else resolve_checkpoint(model)


def which_student(model: str) -> list[str]:
    """Which student of a training run `find_checkpoint` takes, and a warning if it lacks a stage that was begun after.

    Empty for anything but a run folder: there is no choice then.

    Raises:
        UserError: no stage has finished.
    """
    run = RunFolder(Path(model))
    if not run.holds_stages:
        return []
    student = run.last_student()
    used = run.finished()[-1]
    begun = [name for name in STAGES[STAGES.index(used) + 1 :] if run.stage(name).is_begun]
    notes = [f"student: {student}, of {used}, the last stage that finished"]
    if begun:
        notes.append(
            f"warning: {' and '.join(begun)} of {model} began and did not finish, so this student lacks what it "
            "trained; run `cdp train-student` again to go on with it"
        )
    return notes


def load_model(model: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A teacher or a student with its processor, on the GPU when there is one.

    Raises:
        UserError: no such checkpoint, or what `load_multimodal` raises.
    """
    hide_loading_bars()
    folder = find_checkpoint(model)
    device = _device()
    loaded: Any = load_multimodal(folder, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return loaded.to(device), load_processor(folder)


def evaluate_checkpoint(
    model: str,
    pairs: Path,
    images: Path | None,
    config: EvaluationConfig,
    limit: int | None,
    progress: Progress = SILENT,
) -> EvaluationReport:
    """Scores a checkpoint on a folder of pairs in SugarCrepe's layout."""
    suite = load_pairs(pairs, images, limit=limit)
    loaded, processor = load_model(model)
    return evaluate_pairs(loaded, processor, suite, config, progress, title=f"evaluate {Path(model).name}")


@dataclass(frozen=True)
class _Compared:
    """A student ready to be compared with a store's maps."""

    student: Student
    matching: LayerMatching
    layers_from: LayersFrom
    collator: Collator
    notes: list[str]


def compare_with_targets(
    model: str, samples: str, targets: str, limit: int, progress: Progress = SILENT
) -> AttentionSimilarity:
    """Compares a student's attention with the cached maps of the first `limit` samples of a store."""
    store = TargetStore.open(targets)
    compared = _open_student(model, store)
    for note in compared.notes:
        progress.message(f"note: {note}")
    task = progress.task(f"compare {Path(model).name}", limit)
    with closing(_first_samples(samples, store, limit)) as batches:
        return attention_similarity(
            compared.student,
            map(compared.collator, batches),
            compared.matching,
            task,
            layers_from=compared.layers_from,
        )


def attention_pictures(models: Mapping[str, str], samples: str, targets: str, count: int) -> list[ReportSample]:
    """The first `count` images of a store: each image, where the teacher looked, where each student looks.

    Where a student learned from other teacher layers than the one before it, the teacher is shown again.

    Args:
        models: shown name to student checkpoint or training run.
        samples: sample shards.
        targets: target store.
        count: images at most; those whose tokens form no square grid are left out.
    """
    store = TargetStore.open(targets)
    with closing(_first_samples(samples, store, LOOKED_AT * count)) as batches:
        shown = _distinct_images([sample for batch in batches for sample in batch], count)
    if not shown:
        return []
    images = [decode_image(sample.images[0]) for sample in shown]
    pictures: list[list[tuple[str, Image.Image | None]]] = [[("image", enlarged(image))] for image in images]
    windows: tuple[tuple[int, ...], ...] | None = None
    for name, model in models.items():
        compared = _open_student(model, store)
        seen = pooled_attention(
            compared.student, compared.collator(shown).to(compared.student.device, torch.float32), compared.matching
        )
        title = "teacher" if windows is None else f"teacher, as {name} learned"
        for row, image in enumerate(images):
            n = int(seen.num_tokens_B[row])
            if compared.matching.windows != windows:
                pictures[row].append((title, overlay(image, seen.teacher_BN[row, :n])))
            pictures[row].append((name, overlay(image, seen.student_BN[row, :n])))
        windows = compared.matching.windows
    return [
        ReportSample(_first_turns(sample), [(name, picture) for name, picture in row if picture is not None])
        for sample, row in zip(shown, pictures, strict=True)
    ]


def _open_student(model: str, store: TargetStore) -> _Compared:
    folder = find_checkpoint(model)
    hide_loading_bars()
    spec = resolve_reader_spec(store, folder, own_vision=not is_student(folder), kd_weight=0.0)
    trained = StageFolder.of_student(folder).matching()
    matching, notes = match_layers(spec.decoder.num_hidden_layers, store.manifest, trained or MatchingConfig())
    check_maps(str(folder), spec.decoder, matching.student_layers, "attention can be compared in others only")
    # In float32 also on a GPU: figures of two machines are compared.
    loaded: Any = load_student(folder)
    student: Student = loaded.to(_device())
    enable_capture(student)
    layers_from: LayersFrom = "default" if trained is None else "training"
    return _Compared(student, matching, layers_from, Collator(spec.reader), [*spec.notes, *notes])


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _first_samples(samples: str, store: TargetStore, limit: int) -> Generator[list[StreamedSample]]:
    """The first `limit` samples of a store in its own order, in batches; it need not be complete for this."""
    config = StreamConfig(seed=0, shuffle_shards=0, batch_size=min(BATCH_SIZE, limit), allow_incomplete=True)
    stream = target_stream(open_store(samples), store, config, rank=0, world_size=1, epoch=0)
    with closing(iter(stream)) as batches:
        for batch in batches:
            yield batch[:limit]
            limit -= len(batch)
            if limit <= 0:
                return


def _distinct_images(streamed: list[StreamedSample], count: int) -> list[StreamedSample]:
    found: dict[bytes, StreamedSample] = {}
    for sample in streamed:
        if len(sample.images) == 1 and sample.maps is not None:
            found.setdefault(sample.images[0], sample)
    return list(found.values())[:count]


def _first_turns(sample: StreamedSample) -> str:
    question, answer = (turn["value"] for turn in sample.record["conversations"][:2])
    return f"{question.replace('<image>', '').strip()} {answer}"
