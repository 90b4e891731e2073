"""Evaluating checkpoints: finding the model, scoring it, comparing its attention with cached targets."""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.markup import escape
from rich.progress import Progress
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from pipeline.page import PageSample
from pipeline.progress import add_bar
from pipeline.training import STAGES, last_student
from stages.attention import enable_capture
from stages.checkpoints import hide_loading_bars, load_processor, resolve_checkpoint
from stages.evaluation.evaluate import evaluate_pairs
from stages.evaluation.pairs import load_pairs
from stages.evaluation.pictures import enlarged, gaze, overlay
from stages.evaluation.report import EvaluationReport
from stages.evaluation.scoring import EvaluationConfig
from stages.evaluation.similarity import AttentionSimilarity, attention_similarity
from stages.images import decode_image
from stages.student.build import Student, is_student, load_student, register_students
from stages.student.collator import Collator
from stages.student.matching import LayerMatching, match_layers
from stages.student.reading import open_reading
from storage.stores import open_store
from storage.stream import StreamConfig, StreamedSample, target_stream
from storage.targets import TargetStore

BATCH_SIZE = 16


def find_checkpoint(model: str) -> Path:
    """The checkpoint folder: of a training run the last stage's student, else the folder or hub id itself."""
    folder = Path(model)
    if any((folder / stage).is_dir() for stage in STAGES):
        return last_student(folder)
    return folder / "student" if (folder / "student" / "config.json").is_file() else resolve_checkpoint(model)


def load_model(model: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A teacher or a student with its processor, on the GPU when there is one."""
    hide_loading_bars()
    register_students()
    folder = find_checkpoint(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    loaded: PreTrainedModel = (
        AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, trust_remote_code=False).to(device).eval()
    )
    return loaded, load_processor(folder)


def evaluate_checkpoint(
    model: str,
    pairs: Path,
    images: Path | None,
    config: EvaluationConfig,
    limit: int | None,
    progress: Progress,
) -> EvaluationReport:
    """Scores a checkpoint on a folder of pairs in SugarCrepe's layout."""
    suite = load_pairs(pairs, images, limit=limit)
    loaded, processor = load_model(model)
    bar = add_bar(progress, f"evaluate {Path(model).name}", sum(map(len, suite.values())), unit="pairs")
    return evaluate_pairs(loaded, processor, suite, config, lambda amount: progress.advance(bar, amount))


@dataclass(frozen=True)
class _Compared:
    """A student ready to be compared with a store's maps."""

    student: Student
    matching: LayerMatching
    collator: Collator
    notes: list[str]


def compare_with_targets(model: str, samples: str, targets: str, limit: int, progress: Progress) -> AttentionSimilarity:
    """Compares a student's attention with the cached maps of the first `limit` samples of a store."""
    store = TargetStore.open(targets)
    compared = _open_student(model, store)
    for note in compared.notes:
        progress.console.print(f"note: {escape(note)}")
    loader = DataLoader(_stream(samples, store, limit), batch_size=None, collate_fn=compared.collator)
    batches = islice(loader, -(-limit // BATCH_SIZE))
    bar = add_bar(progress, f"compare {Path(model).name}", limit)
    return attention_similarity(
        compared.student, batches, compared.matching, lambda amount: progress.advance(bar, amount)
    )


def gaze_pictures(models: Mapping[str, str], samples: str, targets: str, count: int) -> list[PageSample]:
    """The first `count` images of a store: each image, where the teacher looked, where each student looks.

    Args:
        models: shown name to student checkpoint or training run.
        samples: sample shards.
        targets: target store.
        count: images at most; those whose tokens form no square grid are left out.
    """
    store = TargetStore.open(targets)
    with closing(iter(_stream(samples, store, 8 * count))) as stream:
        shown = _distinct_images([sample for batch in islice(stream, 8 * count) for sample in batch], count)
    if not shown:
        return []
    images = [decode_image(sample.images[0]) for sample in shown]
    pictures: list[list[tuple[str, Image.Image | None]]] = [[("image", enlarged(image))] for image in images]
    for name, model in models.items():
        compared = _open_student(model, store)
        seen = gaze(
            compared.student, compared.collator(shown).to(compared.student.device, torch.float32), compared.matching
        )
        for row, image in enumerate(images):
            n = int(seen.num_tokens_B[row])
            if len(pictures[row]) == 1:
                pictures[row].append(("teacher", overlay(image, seen.teacher_BN[row, :n])))
            pictures[row].append((name, overlay(image, seen.student_BN[row, :n])))
    return [
        PageSample(_first_turns(sample), [(name, picture) for name, picture in row if picture is not None])
        for sample, row in zip(shown, pictures, strict=True)
    ]


def _open_student(model: str, store: TargetStore) -> _Compared:
    folder = find_checkpoint(model)
    hide_loading_bars()
    reading = open_reading(store, folder, own_eyes=not is_student(folder), kd_weight=0.0)
    student = load_student(folder)
    enable_capture(student)
    depth = student.config.get_text_config().num_hidden_layers
    matching, notes = match_layers(depth, store.manifest.fingerprint)
    return _Compared(student, matching, Collator(reading.reader()), [*reading.notes, *notes])


def _stream(samples: str, store: TargetStore, limit: int) -> Any:
    config = StreamConfig(seed=0, shuffle_shards=0, batch_size=min(BATCH_SIZE, limit))
    return target_stream(open_store(samples), store, config, rank=0, world_size=1, epoch=0)


def _distinct_images(streamed: list[StreamedSample], count: int) -> list[StreamedSample]:
    found: dict[bytes, StreamedSample] = {}
    for sample in streamed:
        if len(sample.images) == 1 and sample.maps is not None:
            found.setdefault(sample.images[0], sample)
    return list(found.values())[:count]


def _first_turns(sample: StreamedSample) -> str:
    question, answer = (turn["value"] for turn in sample.record["conversations"][:2])
    return f"{question.replace('<image>', '').strip()} {answer}"
