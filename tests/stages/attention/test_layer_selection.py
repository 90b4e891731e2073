"""Layer matching as published, and derived for any other depth."""

import pytest
import torch

from stages.attention.layer_selection import (
    LayerSpan,
    default_num_matched,
    single_layers,
    sliding_windows,
    span_layers,
    student_layers,
    visual_understanding_layers,
)
from storage.codecs.windows import window_means, window_rows
from storage.errors import UserError


@pytest.mark.parametrize(("depth", "first", "width"), [(24, 8, 2), (28, 9, 3), (32, 11, 3), (40, 13, 5)])
def test_published_depths_give_the_published_layers_and_window_widths(depth: int, first: int, width: int) -> None:
    layers = tuple(visual_understanding_layers(depth))
    windows = sliding_windows(layers, default_num_matched(depth))
    assert layers[0] == first
    assert len(windows) == 7
    assert {len(window) for window in windows} == {width}
    assert student_layers(depth, 7) == tuple(range(first, first + 7))


def test_a_teacher_of_40_layers_needs_layers_13_to_23() -> None:
    assert list(visual_understanding_layers(40)) == list(range(13, 24))


@pytest.mark.parametrize("depth", [*range(1, 24), 36, 48, 64, 80])
def test_no_depth_is_refused_and_layers_stay_inside_the_decoder(depth: int) -> None:
    layers = tuple(visual_understanding_layers(depth))
    matched = default_num_matched(depth)
    assert 0 <= layers[0] <= layers[-1] < depth
    assert 1 <= matched <= 7
    assert student_layers(depth, matched)[-1] < depth
    assert len(sliding_windows(layers, matched)) == matched


def test_windows_slide_by_one_layer_and_cover_all_captured_ones() -> None:
    assert sliding_windows((3, 4, 5, 6), 2) == ((3, 4, 5), (4, 5, 6))


def test_more_matched_layers_than_captured_ones_are_refused() -> None:
    for matching in (sliding_windows, single_layers):
        with pytest.raises(UserError, match="at least as many captured"):
            matching((3, 4), 3)


@pytest.mark.parametrize("depth", [*range(3, 24), 24, 28, 32, 40, 64, 80])
def test_early_middle_and_late_layers_are_all_layers_in_order(depth: int) -> None:
    spans = [list(span_layers(depth, span)) for span in ("early", "middle", "late")]
    assert [*spans[0], *spans[1], *spans[2]] == list(range(depth)) == list(span_layers(depth, "all"))
    assert max(map(len, spans)) - min(map(len, spans)) <= depth // 8 + 1


@pytest.mark.parametrize(("depth", "span"), [(1, "early"), (1, "late"), (2, "late")])
def test_a_decoder_too_shallow_for_a_span_is_refused(depth: int, span: LayerSpan) -> None:
    with pytest.raises(UserError, match=f"a decoder of {depth} layers has no {span} layers"):
        span_layers(depth, span)


def test_a_students_layers_begin_where_the_span_does() -> None:
    assert student_layers(24, 7, "early") == (0, 1, 2, 3, 4, 5, 6)
    assert student_layers(24, 7, "late") == (16, 17, 18, 19, 20, 21, 22)
    assert student_layers(24, 24, "all") == tuple(range(24))


@pytest.mark.parametrize(
    ("captured", "num_matched", "expected"),
    [
        (tuple(range(13, 24)), 7, (13, 15, 16, 18, 20, 21, 23)),
        ((3, 4, 5), 3, (3, 4, 5)),
        ((3, 4, 5), 2, (3, 5)),
        ((3, 4, 5), 1, (4,)),
        ((3, 4), 1, (3,)),
    ],
)
def test_one_to_one_matching_spreads_single_layers_over_all_captured_ones(
    captured: tuple[int, ...], num_matched: int, expected: tuple[int, ...]
) -> None:
    assert single_layers(captured, num_matched) == tuple((layer,) for layer in expected)


def test_window_means_average_the_named_layers() -> None:
    maps = torch.arange(3.0)[:, None, None].expand(3, 2, 2)
    assert window_means(maps, window_rows((5, 6, 7), ((5, 6), (6, 7))))[:, 0, 0].tolist() == [0.5, 1.5]
