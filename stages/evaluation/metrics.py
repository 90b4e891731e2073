"""Counts of items to metrics with their 95 % intervals, by resampling what was drawn as a whole."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from stages.evaluation.suites.suite import Counts, Item, KindCounts, Metrics, Suite

SEED: Final = 0
"""Two runs of a suite are resampled alike, so that they can be compared in pairs."""
_WEIGHTS_AT_ONCE: Final = 2**22
"""How often units were drawn, of several draws: 32 MB."""


@dataclass(frozen=True)
class ScoredItem:
    """An item's kinds, what is drawn with it, and what it counted."""

    kinds: tuple[str, ...]
    unit: str
    counts: Counts


def scored(item: Item, counts: Counts) -> ScoredItem:
    """An item with its counts; it is its own unit if it names none."""
    return ScoredItem(item.kinds, item.unit or item.id, counts)


def suite_metrics(suite: Suite, items: Sequence[ScoredItem], num_resamples: int) -> Metrics:
    """The suite's metrics: of the items, then of `num_resamples` sets drawn with replacement.

    Units are drawn, not items: items about one image are not independent. Where a set has no item of a kind, the kind's
    metrics are NaN: that set says nothing of them.
    """
    return suite.metrics(_summed(items, num_resamples))


def metrics_of_always_yes(suite: Suite, items: Sequence[ScoredItem]) -> Metrics:
    """Of a suite of yes and no, the metrics that always saying yes gets on these items and guessing does not give."""
    return suite.metrics_of_always_yes(_summed(items, 0))


def interval_95(values_R: NDArray[np.float64]) -> tuple[float, float]:
    """Percentile interval of the resampled values behind the first, without those that are NaN."""
    low, high = np.nanpercentile(values_R[1:], [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class _KindTable:
    """What the units with items of one kind count: thousands of kinds have few units each.

    Attributes:
        names: of the counts, `items` among them.
        units: numbers of the units.
        counts: `[unit, name]`.
    """

    names: tuple[str, ...]
    units: NDArray[np.int64]
    counts: NDArray[np.float64]


def _tables(items: Sequence[ScoredItem], number_of: Mapping[str, int]) -> dict[str, _KindTable]:
    found: dict[str, dict[int, dict[str, float]]] = {}
    for item in items:
        for kind in item.kinds:
            of_unit = found.setdefault(kind, {}).setdefault(number_of[item.unit], {})
            for name, value in ({"items": 1.0} | dict(item.counts)).items():
                of_unit[name] = of_unit.get(name, 0.0) + float(value)
    tables = {}
    for kind, of_kind in found.items():
        names = tuple(dict.fromkeys(name for counts in of_kind.values() for name in counts))
        rows = [[counts.get(name, 0.0) for name in names] for counts in of_kind.values()]
        tables[kind] = _KindTable(names, np.array(list(of_kind)), np.array(rows))
    return tables


def _summed(items: Sequence[ScoredItem], num_resamples: int) -> KindCounts:
    """`[1 + num_resamples]` sums of every count of every kind."""
    number_of = {unit: number for number, unit in enumerate(sorted({item.unit for item in items}))}
    tables = _tables(items, number_of)
    parts = {kind: [table.counts.sum(0, keepdims=True)] for kind, table in tables.items()}
    for weights in _drawn(len(number_of), num_resamples):
        for kind, table in tables.items():
            parts[kind].append(weights[:, table.units] @ table.counts)
    sums = {}
    for kind, table in tables.items():
        sums_of_kind = np.concatenate(parts.pop(kind))
        sums_of_kind[sums_of_kind[:, table.names.index("items")] == 0] = np.nan
        sums[kind] = {name: sums_of_kind[:, column] for column, name in enumerate(table.names)}
    return sums


def _drawn(num_units: int, num_resamples: int) -> Iterator[NDArray[np.float64]]:
    """How often each unit is in each resampled set, which has as many units as there are."""
    generator = np.random.default_rng(SEED)
    # In blocks: a product for each draw alone would wait for its threads a thousand times.
    for size in _block_sizes(num_resamples, max(1, _WEIGHTS_AT_ONCE // num_units)):
        drawn = [np.bincount(generator.integers(num_units, size=num_units), minlength=num_units) for _ in range(size)]
        yield np.stack(drawn).astype(np.float64)


def _block_sizes(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def differences(first: Metrics, second: Metrics) -> Mapping[str, Mapping[str, NDArray[np.float64]]]:
    """Second minus first, for every metric that both have; resampled alike, so pairs of them belong together."""
    return {
        kind: {name: second[kind][name] - values for name, values in of_kind.items() if name in second[kind]}
        for kind, of_kind in first.items()
        if kind in second
    }
