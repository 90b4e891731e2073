import pytest
from stages.evaluation.evaluate_pairs import wilson_interval


# Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
@pytest.mark.parametrize(
    ("successes", "num_trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_are_those_of_the_textbook(successes: int, num_trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, num_trials) == pytest.approx((low, high), abs=5e-5)


def test_certain_results_keep_a_width_and_stay_within_bounds() -> None:
    low, high = wilson_interval(10, 10)
    assert 1 - 1e-12 < high <= 1
    assert 0.7 < low < 0.75


def test_half_successes_lie_between_whole_ones() -> None:
    assert wilson_interval(4, 10) < wilson_interval(4.5, 10) < wilson_interval(5, 10)


@pytest.mark.parametrize(("successes", "num_trials"), [(0, 0), (3, 2), (-1, 2)])
def test_impossible_counts_raise(successes: int, num_trials: int) -> None:
    with pytest.raises(ValueError, match="trials"):
        wilson_interval(successes, num_trials)
