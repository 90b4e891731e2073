"""Geometry of the report's charts, worked out by hand."""

import pytest

from pipeline.report.page import Bar, BarGroup, Curve, CurvePanel
from pipeline.ui.report.charts import Tick, bar_chart, line_chart, round_ticks


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0, 0.5, 1]),
        (0.37, 2.4, [0, 1, 2, 3]),
        (10, 400, [0, 100, 200, 300, 400]),
        (-0.2, 0.2, [-0.2, -0.1, 0, 0.1, 0.2]),
        (3.0, 3.0, [1, 2, 3, 4, 5]),
        (0.0, 0.0, [-0.5, 0, 0.5]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low: float, high: float, ticks: list[float]) -> None:
    assert round_ticks(low, high, 4) == pytest.approx(ticks)


def test_lines_lie_in_a_square_of_a_thousand_with_y_downwards() -> None:
    curves = (Curve("a", (0.0, 50.0, 100.0), (0.0, float("nan"), 4.0)), Curve("b", (100.0,), (2.0,), is_held_out=True))
    chart = line_chart(CurvePanel("lm", "step", curves))
    assert [line.points for line in chart.lines] == [((0.0, 1000.0), (1000.0, 0.0)), ((1000.0, 500.0),)]
    assert [line.is_held_out for line in chart.lines] == [False, True]
    assert chart.lines[0].path == "0,1000 1000,0"
    assert chart.y_ticks[0] == Tick(100.0, "0")
    assert chart.y_ticks[-1] == Tick(0.0, "4")


def test_each_layer_gets_its_own_tick() -> None:
    chart = line_chart(CurvePanel("similarity", "layer", (Curve("a", (2, 3, 7), (0.5, 0.6, 0.4)),)), whole_x=True)
    assert [tick.text for tick in chart.x_ticks] == ["2", "3", "7"]
    assert chart.x_ticks[0].percent == pytest.approx(100 * 0.5 / 6)


def test_bars_begin_at_zero_and_end_at_a_hundred_or_at_the_largest_value() -> None:
    row = bar_chart(BarGroup("accuracy", (Bar("a", 60.0, 55.0, 66.0),), 50.0)).rows[0]
    assert (row.width, row.low, row.high) == pytest.approx((60.0, 55.0, 66.0))
    assert row.text == "60.0 [55.0, 66.0]"
    points = bar_chart(BarGroup("points", (Bar("a", 1500.0, 1400.0, 2000.0), Bar("b", -5.0, -9.0, 0.0)), None))
    assert [row.width for row in points.rows] == [75.0, 0.0]
    assert points.chance is None
