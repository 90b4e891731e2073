"""Layer matching as published, and derived for any other depth."""

import pytest
import torch

from stages.layers import (
    default_num_matched,
    sliding_windows,
    student_layers,
    visual_understanding_layers,
    window_means,
)
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
    with pytest.raises(UserError, match="at least as many captured"):
        sliding_windows((3, 4), 3)


def test_window_means_average_the_named_layers() -> None:
    maps = torch.arange(3.0)[:, None, None].expand(3, 2, 2)
    assert window_means(maps, (5, 6, 7), ((5, 6), (6, 7)))[:, 0, 0].tolist() == [0.5, 1.5]
