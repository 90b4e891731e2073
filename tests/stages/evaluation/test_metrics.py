import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest

from stages.evaluation.metrics import SEED, ScoredItem, differences, interval_95, suite_metrics
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


def naive_interval(drawn: Sequence[ScoredItem], kinds: Sequence[str], num_resamples: int) -> tuple[float, float]:
    """Of the mean over kinds of the share of right items: item by item, without a set that has none of them."""
    names = sorted({item.unit for item in drawn})
    generator, found = np.random.default_rng(SEED), []
    for _ in range(num_resamples):
        units = [names[number] for number in generator.integers(len(names), size=len(names))]
        resampled = [item for unit in units for item in drawn if item.unit == unit]
        right = [[item.counts["accuracy"] for item in resampled if kind in item.kinds] for kind in kinds]
        if any(right):
            found.append(100 * np.mean([np.mean(of_kind) for of_kind in right if of_kind]))
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


@pytest.mark.parametrize("shared", [False, True])
def test_a_set_that_lacks_a_kind_says_nothing_of_it(shared: bool) -> None:
    drawn = [*items(1, 1, 0, 1, 1, 1, 1, 0, 1), *items(1, 1, kind="b"), *items(1, kind="c")]
    if shared:
        drawn = [ScoredItem(item.kinds, item.unit[1:], item.counts) for item in drawn]
    metrics = suite_metrics(OneCount(), drawn, 400)
    assert np.isnan(metrics["c"]["accuracy"]).sum() > 50
    for kind in "abc":
        assert interval_95(metrics[kind]["accuracy"]) == pytest.approx(naive_interval(drawn, [kind], 400))
    assert interval_95(metrics["c"]["accuracy"]) == (100, 100)
    assert interval_95(metrics["average"]["accuracy"]) == pytest.approx(naive_interval(drawn, "abc", 400))


def test_thousands_of_kinds_need_memory_for_their_own_units_only() -> None:
    drawn = [ScoredItem(("all", f"k{number % 3000}"), str(number), {"accuracy": number % 2}) for number in range(9000)]
    tracemalloc.start()
    metrics = suite_metrics(OneCount(), drawn, 100)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A dense matrix of units and counts would have 432 MB.
    assert peak < 100 * 2**20
    assert metrics["all"]["accuracy"][0] == 50
    assert len(metrics) == 3002
