"""A tiny student beside maps that are its own."""

from dataclasses import replace

import pytest
import torch

from stages.attention.capture import AttentionCapture, enable_capture
from stages.checkpoints.processors import load_processor
from stages.student.data.batch import Batch
from stages.student.data.collator import Collator
from stages.student.data.sample_reader import SampleReader
from stages.student.model.build import build_student
from stages.student.model.student import Student
from storage.streaming.stream import StreamConfig
from tests.stages.distilled import extract_here, make_tiny_data
from tests.stages.evaluation.attention.matched import MATCHING, coded
from tests.storage.builders import target_stream


@pytest.fixture(scope="module")
def student_and_batch(tmp_path_factory: pytest.TempPathFactory) -> tuple[Student, Batch]:
    """A student, and a batch whose stored maps are the student's own."""
    folder = tmp_path_factory.mktemp("similarity")
    data = make_tiny_data(folder, num_samples=5)
    store = extract_here(data, folder / "targets", max_length=256)
    student = build_student(store.teacher_folder(), data.student_lm, seed=0).eval()
    enable_capture(student)
    collator = Collator(SampleReader(load_processor(store.teacher_folder()), student.config.image_token_id, 10_000))
    config = StreamConfig(seed=0, shuffle_shards=0, batch_size=5)
    stream = target_stream(data.samples, store, config, rank=0, world_size=1, epoch=0)
    batch = collator(next(iter(list(stream))))
    capture = AttentionCapture(frozenset(MATCHING.student_layers), batch.image_positions)
    with torch.no_grad():
        student.model(**batch.inputs, capture=capture)
    own = torch.stack([capture.maps[layer] for layer in MATCHING.student_layers], 1)
    return student, replace(batch, maps=tuple(coded(m) if s else None for m, s in zip(own, batch.maps, strict=True)))
