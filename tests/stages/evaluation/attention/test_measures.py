"""Each measure of attention against its formula in float64, and planted cases whose result is known."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
import torch

from stages.evaluation.attention.measures import (
    correlation,
    map_differences,
    mean_estimate,
    object_auc,
    pair_estimate,
    row_cosine,
    row_keep,
)


def auc(values: list[float], is_object: list[bool], is_background: list[bool] | None = None) -> float:
    background = [not each for each in is_object] if is_background is None else is_background
    return object_auc(torch.tensor(values), torch.tensor(is_object), torch.tensor(background))


def test_auc_worked_out_by_hand() -> None:
    # Objects .5 and .2 against background .4, .2, .1: 3 + (0 + 1/2 + 1) of 6 pairs.
    assert auc([0.5, 0.4, 0.2, 0.2, 0.1], [True, False, True, False, False]) == pytest.approx(4.5 / 6)


def test_attention_on_the_object_alone_has_auc_1_and_on_the_background_alone_0() -> None:
    assert auc([1.0, 1.0, 0.0, 0.0], [True, True, False, False]) == 1.0
    assert auc([0.0, 0.0, 1.0, 1.0], [True, True, False, False]) == 0.0
    assert auc([0.3] * 4, [True, True, False, False]) == 0.5


def test_tokens_that_are_neither_do_not_count_and_without_both_kinds_there_is_no_auc() -> None:
    assert auc([0.5, 9.0, 0.1], [True, False, False], [False, False, True]) == 1.0
    assert math.isnan(auc([0.5, 0.1], [True, True]))
    assert math.isnan(auc([0.5, 0.1], [False, False]))


def test_differences_of_maps_are_the_cosines_of_what_both_keep_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.rand(6, 6, generator=generator).tril() for _ in range(4)]
    keeps = [(each > 0) & (each < 0.8) for each in maps]
    found = map_differences(maps, keeps)
    for i, j in itertools.product(range(4), repeat=2):
        both = keeps[i] & keeps[j]
        a, b = (maps[i].double() * both).flatten().numpy(), (maps[j].double() * both).flatten().numpy()
        assert float(found[i, j]) == pytest.approx(1 - a @ b / np.sqrt((a @ a) * (b @ b)), abs=1e-12)


def test_the_same_map_for_all_images_differs_by_0_from_image_to_image() -> None:
    one = torch.rand(5, 5, generator=torch.Generator().manual_seed(1)).tril()
    estimate = pair_estimate(map_differences([one] * 6, [one > 0] * 6))
    assert estimate is not None
    assert estimate.value == pytest.approx(0, abs=1e-12)
    assert estimate.interval_95 == pytest.approx((0, 0), abs=1e-12)


def test_a_pair_estimate_is_the_mean_over_pairs_and_a_draw_pairs_no_image_with_itself() -> None:
    differences = torch.tensor([[0.0, 0.2, 0.4], [0.2, 0.0, 0.9], [0.4, 0.9, 0.0]])
    estimate = pair_estimate(differences)
    assert estimate is not None
    assert estimate.value == pytest.approx(0.5)
    assert estimate.num_images == 3
    assert estimate.interval_95 is not None
    # An image that is drawn twice is not paired with its copy: no draw goes below the least difference.
    low, high = estimate.interval_95
    assert 0.19 < low < 0.5 < high <= 0.9
    assert pair_estimate(torch.zeros(1, 1)) is None


def test_a_mean_counts_samples_and_its_interval_draws_images_whole() -> None:
    estimate = mean_estimate([1.0, 1.0, 1.0, 0.0, float("nan")], ["a", "a", "a", "b", "c"])
    assert estimate is not None
    assert estimate.value == 0.75
    assert estimate.num_images == 2
    # A quarter of the draws is b twice, a quarter a twice.
    assert estimate.interval_95 == (0.0, 1.0)
    alone = mean_estimate([1.0, 3.0], ["a", "a"])
    assert alone is not None
    assert alone.interval_95 is None
    assert mean_estimate([float("nan")], ["a"]) is None


def test_the_correlation_is_pearsons_with_0_and_1() -> None:
    generator = np.random.default_rng(0)
    right = generator.integers(0, 2, 60).astype(float)
    similarity = generator.normal(size=60) + right
    images = [str(number // 2) for number in range(60)]
    estimate = correlation(similarity.tolist(), right.tolist(), images)
    assert estimate is not None
    assert estimate.value == pytest.approx(float(np.corrcoef(similarity, right)[0, 1]), abs=1e-12)
    assert estimate.interval_95 is not None
    low, high = estimate.interval_95
    assert low < estimate.value < high
    assert low > 0, "a planted correlation"
    assert estimate.num_images == 30


def test_where_all_answers_are_right_there_is_no_correlation() -> None:
    assert correlation([0.1, 0.5], [1.0, 1.0], ["a", "b"]) is None
    assert correlation([0.5, 0.5], [0.0, 1.0], ["a", "b"]) is None
    assert correlation([], [], []) is None


def test_blocks_of_draws_say_what_all_at_once_say() -> None:
    generator = np.random.default_rng(1)
    numbers = generator.integers(0, 3000, 9000)
    x, y = generator.normal(size=9000), generator.integers(0, 2, 9000).astype(float)
    images = [f"{number:04}" for number in numbers]
    tracemalloc.start()
    mean, pearson = mean_estimate(x.tolist(), images), correlation(x.tolist(), y.tolist(), images)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * 2**20, "2000 draws of 9000 values are 144 MB"
    _, place = np.unique(numbers, return_inverse=True)
    count = int(place.max()) + 1
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=2000)
    means, pearsons = [], []
    for one in drawn[:, place]:
        sx, sy = x - (one @ x) / one.sum(), y - (one @ y) / one.sum()
        means.append((one @ x) / one.sum())
        pearsons.append((one @ (sx * sy)) / np.sqrt((one @ sx**2) * (one @ sy**2)))
    assert mean is not None
    assert pearson is not None
    assert mean.interval_95 == pytest.approx(np.percentile(means, [2.5, 97.5]))
    assert pearson.interval_95 == pytest.approx(np.percentile(pearsons, [2.5, 97.5]))


def test_rows_of_text_are_compared_without_the_sinks_of_either() -> None:
    student, teacher = torch.tensor([0.1, 0.2, 0.3, 9.0]), torch.tensor([0.2, 0.4, 0.6, 0.0])
    assert row_keep(student).tolist() == [True, True, True, False]
    assert row_cosine(student, teacher * torch.tensor([1, 1, 1, 0])) == pytest.approx(
        float(np.dot([0.1, 0.2], [0.2, 0.4]) / (np.hypot(0.1, 0.2) * np.hypot(0.2, 0.4))), abs=1e-6
    )
