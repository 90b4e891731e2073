"""Attention similarity and pictures, on maps whose likeness is known."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from stages.evaluation.attention.similarity import attention_similarity, map_similarity
from stages.evaluation.attention_pictures import PICTURE_SIZE, overlay, pooled_attention
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


def test_pooled_attention_is_the_same_for_equal_maps_and_zero_without_an_image(
    student_and_batch: tuple[Student, Batch],
) -> None:
    student, batch = student_and_batch
    seen = pooled_attention(student, batch, MATCHING)
    torch.testing.assert_close(seen.student_BN, seen.teacher_BN, atol=1e-3, rtol=1e-2)
    assert not seen.student_BN[seen.num_tokens_B == 0].any()
    assert bool((seen.student_BN[seen.num_tokens_B > 0].sum(-1) > 0).all())


def test_an_overlay_is_bright_where_attention_goes() -> None:
    received = torch.zeros(16)
    received[0] = 1.0
    picture = overlay(Image.new("RGB", (48, 48), (100, 100, 100)), received)
    assert picture is not None
    assert picture.size == (PICTURE_SIZE, PICTURE_SIZE)
    top_left, bottom_right = (picture.crop(box).resize((1, 1)).getpixel((0, 0)) for box in CORNERS)
    assert isinstance(top_left, tuple)
    assert isinstance(bottom_right, tuple)
    assert top_left[0] > bottom_right[0] + 50


CORNERS = (0, 0, 40, 40), (150, 150, 190, 190)


def test_tokens_that_form_no_square_give_no_picture() -> None:
    assert overlay(Image.new("RGB", (48, 48)), torch.ones(15)) is None
