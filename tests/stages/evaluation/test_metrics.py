from collections.abc import Sequence

import numpy as np
import pytest

from stages.evaluation.metrics import ScoredItem, differences, interval_95, suite_metrics
from stages.evaluation.suites.suite import Answer, Counts, Item, Protocol, Suite
from stages.evaluation.suites.suite_files import SuiteFiles


class OneCount(Suite):
    name = "one-count"
    source = fetch = "nowhere"
    protocols = ("generate",)
    main = ("average", "accuracy")

    def load(self, files: SuiteFiles, protocol: Protocol) -> list[Item]:
        return []

    def count(self, item: Item, answers: Sequence[Answer], protocol: Protocol) -> Counts:
        return {}


def items(*right: int, kind: str = "a", units: int | None = None) -> list[ScoredItem]:
    return [
        ScoredItem((kind,), f"{kind}{number if units is None else number % units}", {"accuracy": value})
        for number, value in enumerate(right)
    ]


def test_counts_are_percents_of_a_kinds_items_and_the_average_is_unweighted() -> None:
    metrics = suite_metrics(OneCount(), [*items(1, 1, 0, 1), *items(0, 1, kind="b")], 100)
    assert {kind: of_kind["accuracy"][0] for kind, of_kind in metrics.items()} == {"a": 75, "b": 50, "average": 62.5}


def test_an_item_counts_for_each_of_its_kinds() -> None:
    metrics = suite_metrics(OneCount(), [ScoredItem(("a", "b"), "1", {"accuracy": 1}), *items(0, kind="b")], 100)
    assert (metrics["a"]["accuracy"][0], metrics["b"]["accuracy"][0]) == (100, 50)


def test_the_interval_of_a_share_is_that_of_the_binomial_distribution() -> None:
    right = np.random.default_rng(1).integers(0, 2, size=400)
    values = suite_metrics(OneCount(), items(*right), 2000)["a"]["accuracy"]
    low, high = interval_95(values)
    half = 1.96 * 100 * np.sqrt(right.mean() * (1 - right.mean()) / 400)
    assert (low, high) == pytest.approx((values[0] - half, values[0] + half), abs=0.6)


def test_items_of_one_unit_are_drawn_together_and_widen_the_interval() -> None:
    # Ten items of each of 40 units are all right or all wrong: 40 facts, not 400.
    right = [number % 40 % 2 for number in range(400)]
    alone = interval_95(suite_metrics(OneCount(), items(*right), 1000)["a"]["accuracy"])
    together = interval_95(suite_metrics(OneCount(), items(*right, units=40), 1000)["a"]["accuracy"])
    assert (together[1] - together[0]) / (alone[1] - alone[0]) == pytest.approx(np.sqrt(10), rel=0.15)


def test_two_results_are_resampled_alike_so_that_equal_answers_never_differ() -> None:
    first = suite_metrics(OneCount(), items(1, 0, 1, 1, 0), 200)
    second = suite_metrics(OneCount(), list(reversed(items(1, 0, 1, 1, 0))), 200)
    assert not differences(first, second)["a"]["accuracy"].any()
    third = differences(first, suite_metrics(OneCount(), items(1, 1, 1, 1, 0), 200))["a"]["accuracy"]
    assert third[0] == pytest.approx(20)
    assert (third >= 0).all()
