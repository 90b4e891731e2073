"""Compares a student's visual attention with the cached targets, in numbers and pictures."""

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoints import find_checkpoint
from pipeline.models import default_device
from stages.attention.capturable_layers import check_maps, layers_with_maps
from stages.attention.capture import enable_capture
from stages.checkpoints.processors import hide_loading_bars
from stages.evaluation.attention.similarity import AttentionSimilarity, LayersFrom, attention_similarity
from stages.student.data.collator import Collator
from stages.student.data.sample_reader import resolve_reader_spec
from stages.student.layer_matching import LayerMatching, MatchingConfig, match_layers
from stages.student.model.loading import load_student
from stages.student.model.student import Student
from stages.student.run_folder import StageFolder
from stages.student.student_kind import is_student
from storage.progress import SILENT, Progress, ProgressTask
from storage.samples.sample_set import SampleSet
from storage.streaming.stream import Mixture, Source, StreamConfig, StreamedSample, mixture_stream
from storage.targets.store import TargetStore

BATCH_SIZE = 16


@dataclass(frozen=True)
class OpenedStudent:
    """A student in float32 with capture enabled, and how it is compared with a store's maps.

    Attributes:
        student: On the GPU when there is one.
        matching: Its layers, and the teacher's window of each.
        layers_from: Whether these pairs are those that a run trained, or those matched by default.
        collator: Makes its batches of streamed samples.
        notes: For the user.
    """

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
    compared = open_student(model, store)
    for note in compared.notes:
        progress.message(f"note: {note}")
    task = progress.task(f"compare {Path(model).name}", min(limit, store.num_samples))
    return similarity_of(compared, samples, store, limit, task)


def similarity_of(
    compared: OpenedStudent,
    samples: str,
    store: TargetStore,
    limit: int,
    task: ProgressTask,
    of_samples: dict[str, tuple[float, ...]] | None = None,
) -> AttentionSimilarity:
    """As `compare_with_targets`, of a loaded student; each sample's own go into `of_samples`, by its key."""
    with closing(first_samples(samples, store, limit)) as batches:
        return attention_similarity(
            compared.student,
            map(compared.collator, batches),
            compared.matching,
            task,
            layers_from=compared.layers_from,
            of_samples=of_samples,
        )


def open_student(model: str, store: TargetStore) -> OpenedStudent:
    """Loads a student, or another multimodal model with maps over the store's image tokens, such as the teacher.

    Raises:
        UserError: If it cannot be compared with the store's maps.
    """
    folder = find_checkpoint(model)
    hide_loading_bars()
    spec = resolve_reader_spec(store, folder, own_vision=not is_student(folder), kd_weight=0.0)
    trained = StageFolder.of_student(folder).matching()
    depth, able = spec.decoder.num_hidden_layers, layers_with_maps(spec.decoder)
    matching, notes = match_layers(depth, store.manifest, trained or MatchingConfig(), able=able)
    check_maps(str(folder), spec.decoder, matching.student_layers, "attention can be compared in others only")
    # In float32 also on a GPU, so that numbers of two machines can be compared.
    loaded: Any = load_student(folder)
    student: Student = loaded.to(default_device())
    enable_capture(student)
    layers_from: LayersFrom = "default" if trained is None else "training"
    return OpenedStudent(student, matching, layers_from, Collator(spec.reader), [*spec.notes, *notes])


def first_samples(
    samples: str, store: TargetStore, limit: int, *, with_answers: bool = False
) -> Generator[list[StreamedSample]]:
    """The first `limit` samples of a store in its own order, with all maps, in batches; it need not be complete.

    `with_answers`: with answer attention as well.
    """
    config = StreamConfig(seed=0, shuffle_shards=0, batch_size=min(BATCH_SIZE, limit), allow_incomplete=True)
    mixture = Mixture([Source(SampleSet.open(samples), store)], config)
    stream = mixture_stream(mixture, rank=0, world_size=1, epochs=range(1), with_answers=with_answers)
    with closing(iter(stream)) as batches:
        for batch in batches:
            yield batch[:limit]
            limit -= len(batch)
            if limit <= 0:
                return
