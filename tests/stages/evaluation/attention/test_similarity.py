"""Attention similarity, on maps whose likeness is known."""

from dataclasses import replace

import pytest
import torch

from stages.evaluation.attention.similarity import attention_similarity, map_similarity
from stages.student.data.batch import Batch
from stages.student.model.student import Student
from storage.codecs.sinks import sink_keep_mask
from tests.stages.evaluation.attention.matched import MATCHING


def test_a_student_is_wholly_similar_to_its_own_maps(student_and_batch: tuple[Student, Batch]) -> None:
    student, batch = student_and_batch
    result = attention_similarity(student, [batch, batch], MATCHING)
    assert result.num_samples == 2 * batch.num_with_image
    assert result.mean == pytest.approx(1.0, abs=1e-4)
    assert max(result.alignment_loss) == pytest.approx(0.0, abs=1e-4)


def test_other_maps_are_less_similar(student_and_batch: tuple[Student, Batch]) -> None:
    student, batch = student_and_batch
    other = replace(MATCHING, student_layers=(0, 5))
    assert attention_similarity(student, [batch], other).mean < 0.99


def test_similarity_ignores_sinks_of_either_side() -> None:
    maps = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)).tril()
    with_sink = maps.clone()
    with_sink[0, 7, 0] = 50.0
    keep = sink_keep_mask(with_sink)
    assert float(map_similarity(maps, with_sink, keep, torch.tensor([8]))[0]) == pytest.approx(1.0, abs=1e-5)
