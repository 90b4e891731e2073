"""Geometry of the report's charts, in units that need no script and fit any width.

Lines are in a square of 1000 by 1000 that is stretched; labels stand at percents of an edge, so that they are not.
"""

import math
from dataclasses import dataclass

from pipeline.report.page import BarGroup, Curve, CurvePanel

_UNITS = 1000
_MOST_MARKED = 24
"""Points of a curve that are marked; more would touch."""


@dataclass(frozen=True)
class Tick:
    """A label at a percent of an axis, from its start."""

    percent: float
    text: str


@dataclass(frozen=True)
class Line:
    """A curve with its points in units of the square, y downwards."""

    model: str
    is_held_out: bool
    points: tuple[tuple[float, float], ...]
    is_marked: bool

    @property
    def path(self) -> str:
        """As an SVG polyline has it."""
        return " ".join(f"{x:.0f},{y:.0f}" for x, y in self.points)


@dataclass(frozen=True)
class LineChart:
    """Lines with the ticks of both axes."""

    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class BarRow:
    """A bar from zero, with its interval, in percents of the width."""

    model: str
    width: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class BarChart:
    """Bars of one metric."""

    rows: tuple[BarRow, ...]
    chance: float | None
    chance_text: str


def line_chart(panel: CurvePanel, *, whole_x: bool = False) -> LineChart:
    """Places the curves; the axes end at round numbers around them.

    Args:
        panel: has one value at least.
        whole_x: whether each x is a thing of its own, such as a layer, and gets a tick.
    """
    xs = [x for curve in panel.curves for x in curve.x]
    ys = [y for curve in panel.curves for y in curve.y if math.isfinite(y)]
    y_values = round_ticks(min(ys), max(ys), 4)
    if whole_x and len(set(xs)) <= 16:
        x_values, edges = sorted(set(xs)), (min(xs) - 0.5, max(xs) + 0.5)
    else:
        x_values = [x for x in round_ticks(min(xs), max(xs), 4) if min(xs) <= x <= max(xs)]
        edges = (min(xs), max(xs))
    low, high = y_values[0], y_values[-1]
    return LineChart(
        lines=tuple(_line(curve, edges, (low, high)) for curve in panel.curves),
        x_ticks=tuple(Tick(100 * _share(x, *edges), _number(x)) for x in x_values),
        y_ticks=tuple(Tick(100 - 100 * _share(y, low, high), _number(y)) for y in y_values),
    )


def bar_chart(group: BarGroup) -> BarChart:
    """Places the bars on an axis from zero, to 100 where nothing is larger."""
    end = max(100.0, *(bar.high for bar in group.bars), *(bar.value for bar in group.bars))

    def percent(value: float) -> float:
        return 100 * min(max(value / end, 0.0), 1.0)

    return BarChart(
        rows=tuple(
            BarRow(
                bar.model,
                percent(bar.value),
                percent(bar.low),
                percent(bar.high),
                f"{bar.value:.1f} [{bar.low:.1f}, {bar.high:.1f}]",
            )
            for bar in group.bars
        ),
        chance=None if group.chance is None else percent(group.chance),
        chance_text="" if group.chance is None else f"{group.chance:.1f}",
    )


def round_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers with equal steps; the first is not above `low`, the last not below `high`."""
    if not high > low:
        low, high = low - max(abs(low), 1) / 2, high + max(abs(high), 1) / 2
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _line(curve: Curve, x_edges: tuple[float, float], y_edges: tuple[float, float]) -> Line:
    points = tuple(
        (_UNITS * _share(x, *x_edges), _UNITS - _UNITS * _share(y, *y_edges))
        for x, y in zip(curve.x, curve.y, strict=True)
        if math.isfinite(y)
    )
    return Line(curve.model, curve.is_held_out, points, len(points) <= _MOST_MARKED)


def _share(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
