"""Results of one suite side by side: each metric with its interval, and its difference to the first result."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from stages.evaluation.answered_items import ITEMS, read_items
from stages.evaluation.metrics import ScoredItem, differences, interval_95, suite_metrics
from stages.evaluation.result import RESULT_FILE, Metric, SuiteResult, SuiteRun, difference_of, read_result
from stages.evaluation.suites.registry import SUITES
from stages.evaluation.suites.suite import Metrics
from storage.errors import UserError
from storage.strict_model import StrictModel

NUM_RESAMPLES: Final = 2000
_SAME: Final = ("suite", "protocol", "items")
"""What results must share to be compared."""
_SHOWN: Final = 5
"""Items that an error names."""
_AGAIN: Final = "run the same `cdp evaluate` again, which sums up its saved answers anew"


class Difference(StrictModel):
    """A result minus the first, on the same items."""

    value: float
    interval_95: tuple[float, float]
    """By bootstrap of both results on the same resampled items."""
    p_value: float
    """Two-sided, for no difference."""
    test: Literal["mcnemar", "bootstrap"]
    """McNemar's exact test where the metric is the share of items that are right (or wrong) and each item is drawn
    alone, else the paired bootstrap."""
    num_units: int
    """What is drawn."""
    units: Literal["items", "images"]
    """Images where several items are about one."""


class ComparedMetric(StrictModel):
    """One metric of all results, by their names."""

    values: dict[str, Metric]
    differences: dict[str, Difference]
    """Of all but the first."""


class SuiteComparison(StrictModel):
    """Results of one suite, by kind and metric."""

    suite: str
    protocol: str
    results: dict[str, SuiteRun]
    """What each name stands for; the first is what the others are compared with."""
    metrics: dict[str, dict[str, ComparedMetric]]


@dataclass(frozen=True)
class _Read:
    """A result whose metrics are those of its items; items by id, in the order of ids."""

    name: str
    folder: Path
    result: SuiteResult
    items: Mapping[str, ScoredItem]
    values: Metrics


def compare_results(folders: Mapping[str, Path]) -> SuiteComparison:
    """Compares results of one suite on the same items.

    Args:
        folders: name to the folder of a suite that `cdp evaluate` saved; the first is what others are compared with.

    Raises:
        UserError: If a folder holds no result, its metrics are not those of its items, or results are of other items,
            another suite or protocol.
    """
    results = {name: read_result(folder) for name, folder in folders.items()}
    items = {
        name: {one.id: one.scored for _, one in sorted(read_items(folder).items())} for name, folder in folders.items()
    }
    _check_same(results, items)
    first, *others = [_read(name, folders[name], result, items[name]) for name, result in results.items()]
    for other in others:
        _check_items(first, other)
    minus = {other.name: differences(first.values, other.values) for other in others}
    return SuiteComparison(
        suite=first.result.run.suite,
        protocol=first.result.run.protocol,
        results={one.name: one.result.run for one in (first, *others)},
        metrics={
            kind: {
                metric: ComparedMetric(
                    values={one.name: one.result.metrics[kind][metric] for one in (first, *others)},
                    differences={
                        other.name: _difference(minus[other.name][kind][metric], first, other, kind, metric)
                        for other in others
                    },
                )
                for metric in of_kind
            }
            for kind, of_kind in first.result.metrics.items()
        },
    )


def _check_same(results: Mapping[str, SuiteResult], items: Mapping[str, Mapping[str, ScoredItem]]) -> None:
    (first_name, first), *others = results.items()
    for name, result in others:
        if found := difference_of(result.run, first.run, f"{first_name}'s", _SAME):
            found = f"{name} cannot be compared with {first_name}: {found}"
            raise UserError(found + _lone(items[first_name], items[name]))


def _lone(first: Mapping[str, ScoredItem], other: Mapping[str, ScoredItem]) -> str:
    """Names the first items that only one result has."""
    ids = sorted(first.keys() ^ other.keys())
    return f"; {len(ids):,} items are in only one, as {', '.join(ids[:_SHOWN])}" if ids else ""


def _read(name: str, folder: Path, result: SuiteResult, items: Mapping[str, ScoredItem]) -> _Read:
    if not items:
        raise UserError(f"{folder} holds no answered items; expected {ITEMS} beside its {RESULT_FILE}; {_AGAIN}")
    try:
        values = suite_metrics(SUITES[result.run.suite], list(items.values()), NUM_RESAMPLES)
    except LookupError as error:
        # A suite's metrics count on what its items have; these lines may be anybody's.
        found = f"{folder}: {ITEMS} lack a kind or count of {result.run.suite} ({error})"
        raise UserError(f"{found}; restore them, or name the --output of another run") from error
    _check_metrics(folder / RESULT_FILE, result, values)
    return _Read(name, folder, result, items, values)


def _check_metrics(file: Path, result: SuiteResult, values: Metrics) -> None:
    saved = {(kind, name): one.value for kind, found in result.metrics.items() for name, one in found.items()}
    counted = {(kind, name): float(one[0]) for kind, found in values.items() for name, one in found.items()}
    for kind, name in {**saved, **counted}:
        said, right = saved.get((kind, name)), counted.get((kind, name))
        if said is None or right is None or not math.isclose(said, right, rel_tol=1e-9, abs_tol=1e-6):
            what = f"{name} of {kind}"[:200]
            raise UserError(f"{file}: {what} is {said}, and {right} by the items beside it; {_AGAIN}")


def _check_items(first: _Read, other: _Read) -> None:
    if other.items.keys() != first.items.keys():
        found = f"{len(other.items)} items of {other.name} were answered, {len(first.items)} of {first.name}"
        raise UserError(
            f"{found}{_lone(first.items, other.items)}; finish both with the same `cdp evaluate` and images"
        )
    for key, item in first.items.items():
        if (item.kinds, item.unit) != (other.items[key].kinds, other.items[key].unit):
            found = f"{other.folder}: item {key!r:.100} has other kinds or another unit than in {first.folder}"
            raise UserError(f"{found}; {_AGAIN}")


def _difference(values: NDArray[np.float64], first: _Read, second: _Read, kind: str, metric: str) -> Difference:
    # An average over kinds is over the items of all.
    keys = [key for key, one in first.items.items() if kind in one.kinds] or list(first.items)
    num_units = len({first.items[key].unit for key in keys})
    outcomes = [_outcomes(read, keys, kind, metric) for read in (first, second)]
    # Items about one image are not independent, as McNemar's test takes them to be.
    is_exact = num_units == len(keys) and None not in outcomes
    return Difference(
        value=float(values[0]),
        interval_95=interval_95(values),
        p_value=mcnemar(*outcomes) if is_exact else _bootstrap_p(values),  # type: ignore[arg-type]
        test="mcnemar" if is_exact else "bootstrap",
        num_units=num_units,
        units="items" if num_units == len(keys) else "images",
    )


def _outcomes(read: _Read, keys: Sequence[str], kind: str, metric: str) -> list[float] | None:
    """What each item counts, 0 or 1; None if the metric is not the share of items that count 1."""
    found = [read.items[key].counts.get(metric, -1.0) for key in keys]
    is_share = all(value in (0, 1) for value in found) and math.isclose(
        float(read.values[kind][metric][0]), 100 * sum(found) / len(found), rel_tol=1e-9, abs_tol=1e-9
    )
    return found if is_share else None


def mcnemar(first: Sequence[float], second: Sequence[float]) -> float:
    """Exact two-sided p-value of McNemar's test on paired outcomes, each 0 or 1.

    Source: Q. McNemar, "Note on the sampling error of the difference between correlated proportions", 1947.
    """
    gained = sum(before < after for before, after in zip(first, second, strict=True))
    lost = sum(before > after for before, after in zip(first, second, strict=True))
    changed = gained + lost
    # Logarithms of the binomial probabilities of 0, 1, ... changes for the rarer direction.
    counts = np.arange(1, min(gained, lost) + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log((changed - counts + 1) / counts))]) - changed * math.log(2)
    return float(min(1.0, 2 * np.exp(logs).sum()))


def _bootstrap_p(values: NDArray[np.float64]) -> float:
    """Twice the share of differences on the other side of zero or at it, the observed one counted as such."""
    resampled = values[1:][~np.isnan(values[1:])]
    num_opposite = min(int((resampled <= 0).sum()), int((resampled >= 0).sum()))
    return float(min(1.0, 2 * (num_opposite + 1) / (len(resampled) + 1)))
