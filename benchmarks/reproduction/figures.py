"""Figures and tables of docs/reproduction.md, from the records: `python -m benchmarks.reproduction.figures`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from benchmarks.reproduction.arms import CEILING, CLAIMED
from benchmarks.reproduction.tables import PAGE, with_tables
from benchmarks.results import RESULTS

FIGURES = Path("docs/reproduction")
COLOURS = {
    "SFT": "#888888",
    "logits, own projector": "#1f6fb4",
    "logits and attention": "#d1495b",
    "rows": "#7b3fa0",
    "logits": "#00838f",
    "all": "#c77800",
}
"""Arms whose curves are drawn."""
KINDS = {
    "colour_named": "colour of an object",
    "end_named": "neighbour of an object at the end",
    "middle_named": "neighbour of the one between",
}
FINAL = {"colour": "colour, of two words", "end_named": "end", "middle_named": "middle"}


def main() -> None:
    """Draws the curves of some arms and how all end, and puts the tables into the page."""
    # The same record gives the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "reproduction", "svg.fonttype": "none", "font.family": "sans-serif"})
    record = json.loads((RESULTS / "reproduction_compare.json").read_text())
    FIGURES.mkdir(parents=True, exist_ok=True)
    _save(_curves(record["arms"]), FIGURES / "curves.svg")
    _save(_final(record["summary"]["arms"]), FIGURES / "final.svg")
    PAGE.write_text(with_tables(PAGE.read_text()))


def _curves(arms: Mapping[str, Mapping[str, Any]]) -> Figure:
    figure, axes = pyplot.subplots(1, len(KINDS), figsize=(10, 3.2), sharey=True, layout="constrained")
    for axis, (kind, title) in zip(axes, KINDS.items(), strict=True):
        for arm in COLOURS:
            _band(axis, arm, [run["curve"] for run in arms[arm].values()], kind)
        axis.set(title=title, xlabel="step", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of right words")
    axes[0].legend(fontsize=8, frameon=False)
    return figure


def _band(axis: Axes, arm: str, curves: Sequence[Sequence[Mapping[str, float]]], kind: str) -> None:
    """The mean over seeds, with its 95 % interval."""
    steps = [point["step"] for point in curves[0]]
    values_SP = np.array([[point[kind] for point in curve] for curve in curves])
    mean_P = values_SP.mean(0)
    half_P = stats.sem(values_SP) * stats.t.ppf(0.975, len(values_SP) - 1) if len(values_SP) > 1 else 0 * mean_P
    axis.plot(steps, mean_P, color=COLOURS[arm], label=arm)
    axis.fill_between(steps, mean_P - half_P, mean_P + half_P, color=COLOURS[arm], alpha=0.2, linewidth=0)


def _final(summary: Mapping[str, Any]) -> Figure:
    figure, axes = pyplot.subplots(1, len(FINAL), figsize=(10, 3.2), sharey=True, layout="constrained")
    arms = [arm for arm in {**CLAIMED, **CEILING} if arm in summary]
    for axis, (kind, title) in zip(axes, FINAL.items(), strict=True):
        for place, arm in enumerate(arms):
            found = summary[arm][kind]
            low, high = found["interval_95"] or (found["mean"], found["mean"])
            axis.plot([low, high], [place, place], color=COLOURS.get(arm, "#444444"), linewidth=2)
            axis.plot(found["mean"], place, "o", color=COLOURS.get(arm, "#444444"))
        axis.set(title=title, xlim=(0, 1.05), xlabel="share of right words")
        axis.grid(alpha=0.3, axis="x")
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].invert_yaxis()
    return figure


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    print(path)


if __name__ == "__main__":
    main()
