"""Counts of items to metrics with their 95 % intervals, by resampling what was drawn as a whole."""

from collections.abc import Mapping, Sequence
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

    Units are drawn, not items: items about one image are not independent.
    """
    return suite.metrics(_summed(items, num_resamples))


def interval_95(values_R: NDArray[np.float64]) -> tuple[float, float]:
    """Percentile interval of the resampled values behind the first."""
    low, high = np.percentile(values_R[1:], [2.5, 97.5])
    return float(low), float(high)


def _summed(items: Sequence[ScoredItem], num_resamples: int) -> KindCounts:
    """`[1 + num_resamples]` sums of every count of every kind."""
    units = {unit: number for number, unit in enumerate(sorted({item.unit for item in items}))}
    columns: dict[tuple[str, str], int] = {}
    entries: list[tuple[int, int, float]] = []
    for item in items:
        for kind in item.kinds:
            for name, value in ({"items": 1.0} | dict(item.counts)).items():
                column = columns.setdefault((kind, name), len(columns))
                entries.append((units[item.unit], column, float(value)))
    rows, cols, values = map(np.asarray, zip(*entries, strict=True))
    counts = np.zeros((len(units), len(columns)))
    np.add.at(counts, (rows.astype(int), cols.astype(int)), values)
    sums = np.concatenate([counts.sum(0, keepdims=True), _resampled(counts, num_resamples)])
    by_kind: dict[str, dict[str, NDArray[np.float64]]] = {}
    for (kind, name), column in columns.items():
        by_kind.setdefault(kind, {})[name] = sums[:, column]
    return by_kind


def _resampled(counts: NDArray[np.float64], num_resamples: int) -> NDArray[np.float64]:
    """Sums over units that are drawn with replacement, as many as there are."""
    num_units, generator = len(counts), np.random.default_rng(SEED)
    parts = [np.empty((0, counts.shape[1]))]
    # In blocks: a product for each draw alone would wait for its threads a thousand times.
    for size in _block_sizes(num_resamples, max(1, _WEIGHTS_AT_ONCE // num_units)):
        drawn = [np.bincount(generator.integers(num_units, size=num_units), minlength=num_units) for _ in range(size)]
        parts.append(np.stack(drawn).astype(np.float64) @ counts)
    return np.concatenate(parts)


def _block_sizes(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def differences(first: Metrics, second: Metrics) -> Mapping[str, Mapping[str, NDArray[np.float64]]]:
    """Second minus first, for every metric that both have; resampled alike, so pairs of them belong together."""
    return {
        kind: {name: second[kind][name] - values for name, values in of_kind.items() if name in second[kind]}
        for kind, of_kind in first.items()
        if kind in second
    }
