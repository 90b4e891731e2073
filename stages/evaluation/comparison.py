"""Results of one suite side by side: each metric with its interval, and its difference to the first result."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from stages.evaluation.metrics import ScoredItem, differences, interval_95, suite_metrics
from stages.evaluation.result import Metric, SuiteResult, SuiteRun, read_items, read_result
from stages.evaluation.suites.registry import SUITES
from storage.errors import UserError
from storage.strict_model import StrictModel

NUM_RESAMPLES: Final = 2000
_SAME: Final = ("suite", "protocol", "items")
"""What results must share to be compared."""


class Difference(StrictModel):
    """A result minus the first, on the same items."""

    value: float
    interval_95: tuple[float, float]
    """By bootstrap of both results on the same resampled items."""
    p_value: float
    """Two-sided, for no difference."""
    test: Literal["mcnemar", "bootstrap"]
    """McNemar's exact test where each item is right or wrong and drawn alone, else the paired bootstrap."""


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


def compare_results(folders: Mapping[str, Path]) -> SuiteComparison:
    """Compares results of one suite on the same items.

    Args:
        folders: name to the folder of a suite that `cdp evaluate` saved; the first is what others are compared with.

    Raises:
        UserError: If a folder holds no result, or results are of other items, another suite or protocol.
    """
    results = {name: read_result(folder) for name, folder in folders.items()}
    (first_name, first), *others = results.items()
    for name, result in others:
        for what in _SAME:
            if (was := getattr(first.run, what)) != (now := getattr(result.run, what)):
                raise UserError(f"{name} cannot be compared with {first_name}: its {what} is {now}, not {was}")
    scored = {
        name: {one.id: one.scored for _, one in sorted(read_items(folder).items())} for name, folder in folders.items()
    }
    for name, items in scored.items():
        if items.keys() != scored[first_name].keys():
            found = f"{len(items)} items of {name} were answered, {len(scored[first_name])} of {first_name}"
            raise UserError(f"{found}; finish both with `cdp evaluate`, with the same images")
    return SuiteComparison(
        suite=first.run.suite,
        protocol=first.run.protocol,
        results={name: result.run for name, result in results.items()},
        metrics=_compared(results, {name: list(items.values()) for name, items in scored.items()}),
    )


def _compared(
    results: Mapping[str, SuiteResult], scored: Mapping[str, Sequence[ScoredItem]]
) -> dict[str, dict[str, ComparedMetric]]:
    (first_name, first), *others = results.items()
    suite = SUITES[first.run.suite]
    values = {name: suite_metrics(suite, items, NUM_RESAMPLES) for name, items in scored.items()}
    minus = {name: differences(values[first_name], values[name]) for name, _ in others}
    return {
        kind: {
            metric: ComparedMetric(
                values={name: result.metrics[kind][metric] for name, result in results.items()},
                differences={
                    name: _difference(of_result[kind][metric], scored[first_name], scored[name], kind, metric)
                    for name, of_result in minus.items()
                },
            )
            for metric in of_kind
        }
        for kind, of_kind in first.metrics.items()
    }


def _difference(
    values: NDArray[np.float64], first: Sequence[ScoredItem], second: Sequence[ScoredItem], kind: str, metric: str
) -> Difference:
    outcomes = [[one.counts.get(metric) for one in items if kind in one.kinds] for items in (first, second)]
    units = [one.unit for one in first if kind in one.kinds]
    is_right_or_wrong = bool(outcomes[0]) and all(value in (0, 1) for of_result in outcomes for value in of_result)
    # Items about one image are not independent, as the test takes them to be.
    is_exact = is_right_or_wrong and len(set(units)) == len(units)
    return Difference(
        value=float(values[0]),
        interval_95=interval_95(values),
        p_value=mcnemar(*outcomes) if is_exact else _bootstrap_p(values),  # type: ignore[arg-type]
        test="mcnemar" if is_exact else "bootstrap",
    )


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
    resampled = values[1:]
    num_opposite = min(int((resampled <= 0).sum()), int((resampled >= 0).sum()))
    return float(min(1.0, 2 * (num_opposite + 1) / (len(resampled) + 1)))
