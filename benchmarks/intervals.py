"""Intervals of means over independent runs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats


def estimate(values: Sequence[float]) -> dict[str, Any]:
    """Mean and 95 % interval of the mean, by Student's t; no interval of a single run."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"mean": mean, "interval_95": None}
    spread = float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))
    return {"mean": mean, "interval_95": [mean - spread, mean + spread]}
