"""Evaluates checkpoints: answers to suites, and visual attention against cached targets."""

import time
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pipeline.checkpoints import find_checkpoint
from pipeline.models import default_device, load_model
from pipeline.ui.html_report import ReportSample
from stages.attention.capturable_layers import check_maps
from stages.attention.capture import enable_capture
from stages.checkpoints.processors import hide_loading_bars, image_processor_backend
from stages.checkpoints.weights import weights_digest
from stages.evaluation.answering.answerer import Answerer
from stages.evaluation.attention_pictures import enlarged, overlay, pooled_attention
from stages.evaluation.attention_similarity import AttentionSimilarity, LayersFrom, attention_similarity
from stages.evaluation.config import EvaluationConfig, SuiteConfig
from stages.evaluation.result import (
    RESULT_FILE,
    SuiteResult,
    SuiteRun,
    begun_items,
    items_digest,
    make_result,
    read_items,
    write_server_files,
)
from stages.evaluation.run_suite import LoadedSuite, ask_items, load_suite
from stages.images import decode_image
from stages.student.data.collator import Collator
from stages.student.data.sample_reader import resolve_reader_spec
from stages.student.layer_matching import LayerMatching, MatchingConfig, match_layers
from stages.student.model.loading import load_student
from stages.student.model.student import Student, is_student
from stages.student.run_folder import StageFolder
from storage.progress import SILENT, Progress
from storage.samples.image_settings import DEFAULT_IMAGES, ImageConfig
from storage.samples.sample_set import SampleSet
from storage.stores import open_store
from storage.streaming.stream import Mixture, Source, StreamConfig, StreamedSample, mixture_stream
from storage.targets.store import TargetStore

BATCH_SIZE = 16
SAMPLES_A_PICTURE = 8
"""Samples read for each picture, because several may share an image."""


def evaluate_suites(
    model: str,
    suites: Mapping[str, SuiteConfig],
    config: EvaluationConfig,
    output: Path,
    progress: Progress = SILENT,
    reading: ImageConfig = DEFAULT_IMAGES,
) -> dict[str, SuiteResult]:
    """Asks a checkpoint all suites, each into its folder of `output`; goes on where an earlier command stopped.

    `reading` is for a checkpoint that does not say how it reads pictures.

    Raises:
        UserError: If a suite's folder or the checkpoint cannot be used, or the folder holds answers of another run.
    """
    loaded = {name: load_suite(name, suite) for name, suite in suites.items()}
    weights, (network, processor) = weights_digest(find_checkpoint(model)), load_model(model)
    results = {}
    for name, suite in loaded.items():
        answerer = Answerer(network, processor, config, reading, blank=suite.blind)
        for note in answerer.notes:
            progress.message(f"note: {note}")
        run = SuiteRun(
            suite=name,
            protocol=suite.protocol,
            blind=suite.blind,
            items=items_digest([*suite.items, *suite.missing]),
            model=network.name_or_path,
            weights=weights,
            dtype=str(network.dtype).removeprefix("torch."),
            image_backend=image_processor_backend(processor),
            images=answerer.images,
        )
        results[name] = _answered(suite, run, answerer, output / name, config.num_resamples, progress)
    return results


def _answered(
    suite: LoadedSuite, run: SuiteRun, answerer: Answerer, folder: Path, num_resamples: int, progress: Progress
) -> SuiteResult:
    """Asks what was not asked yet, and sums up."""
    with begun_items(folder, run) as items:
        left = [item for item in suite.items if item.id not in items.answered]
        task = progress.task(f"{suite.suite.name} {Path(run.model).name}", len(suite.items), unit="items")
        task.advance(len(suite.items) - len(left))
        start = time.perf_counter()
        ask_items(answerer, suite, left, items.append, task)
        seconds = time.perf_counter() - start
    answered = read_items(folder)
    result = make_result(
        run, [answered[item.id] for item in suite.items], suite.missing, num_resamples, seconds, len(left)
    )
    open_store(folder).write(RESULT_FILE, result.to_json().encode())
    for path in write_server_files(folder, run.suite, [answered[item.id] for item in suite.items]):
        progress.message(f"wrote {path} for the server of {run.suite}'s makers, which alone has the labels")
    return result


@dataclass(frozen=True)
class _Compared:
    """A student in float32 with capture enabled, and how it is compared with a store's maps."""

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
    """Pictures of visual attention on the first `count` images of a store: the image, the teacher, each student.

    The teacher is shown again for a student that learned from other teacher layers than the student before it.

    Args:
        models: Shown name to student checkpoint or training run.
        samples: Sample shards.
        targets: Target store.
        count: Images at most; those whose tokens form no square grid are left out.
    """
    store = TargetStore.open(targets)
    with closing(_first_samples(samples, store, SAMPLES_A_PICTURE * count)) as batches:
        shown = _distinct_images([sample for batch in batches for sample in batch], count)
    if not shown:
        return []
    exif = store.manifest.fingerprint.images.exif
    images = [decode_image(sample.images[0], exif=exif) for sample in shown]
    pictures: list[list[tuple[str, Image.Image | None]]] = [[("image", enlarged(image))] for image in images]
    windows: tuple[tuple[int, ...], ...] | None = None
    for name, model in models.items():
        compared = _open_student(model, store)
        batch = compared.collator(shown).to(compared.student.device, torch.float32)
        seen = pooled_attention(compared.student, batch, compared.matching)
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
    # In float32 also on a GPU, so that numbers of two machines can be compared.
    loaded: Any = load_student(folder)
    student: Student = loaded.to(default_device())
    enable_capture(student)
    layers_from: LayersFrom = "default" if trained is None else "training"
    return _Compared(student, matching, layers_from, Collator(spec.reader), [*spec.notes, *notes])


def _first_samples(samples: str, store: TargetStore, limit: int) -> Generator[list[StreamedSample]]:
    """The first `limit` samples of a store in its own order, in batches; it need not be complete for this."""
    config = StreamConfig(seed=0, shuffle_shards=0, batch_size=min(BATCH_SIZE, limit), allow_incomplete=True)
    mixture = Mixture([Source(SampleSet.open(samples), store)], config)
    stream = mixture_stream(mixture, rank=0, world_size=1, epochs=range(1))
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
    turns = [turn["value"] for turn in sample.record["conversations"] if turn["from"] != "system"]
    question, answer = turns[:2]
    return f"{question.replace('<image>', '').strip()} {answer}"
