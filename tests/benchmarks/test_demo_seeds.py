"""Runs of several seeds are summed up seed by seed."""

import numpy as np
import pytest

from benchmarks.demo_seeds import summarize_runs
from benchmarks.intervals import estimate
from pipeline.demo.loop_comparison import LoopComparison
from pipeline.demo.recorded import RecordedRuns, accuracy_table, loop_table
from pipeline.demo.report import STUDENTS, DemoConfig, DemoReport, StudentResult
from stages.evaluation.result import Metric, SuiteResult
from tests.suite_runs import suite_run


def suite_result(accuracy: float) -> SuiteResult:
    metric = Metric(value=accuracy, interval_95=(0, 100), chance=50)
    return SuiteResult(
        run=suite_run(),
        metrics={kind: {"accuracy": metric} for kind in ("swap_obj", "average")},
        num_items={"swap_obj": 10},
        num_missing=0,
        seconds=1,
        items_per_s=1,
    )


def report(seed: int, sft: float, logits: float, both: float) -> DemoReport:
    students = {
        name: StudentResult(evaluation=suite_result(value), similarity=value / 100, held_out_lm=1 / value, seconds=1)
        for name, value in zip(STUDENTS, (sft, logits, both), strict=True)
    }
    loop = LoopComparison(
        steps=20,
        largest_difference={"lm": 1e-6 * (seed + 1), "kd": 1e-6, "attention": 1e-4},
        step_s={name: 0.1 * number for number, name in enumerate([*STUDENTS, "teacher in the loop"], 1)},
    )
    teacher = suite_result(97)
    return DemoReport(
        config=DemoConfig(seed=seed),
        seconds={"draw scenes": 1, "train": 2},
        target_bytes=1,
        raw_bytes=2,
        teacher=teacher,
        students=students,
        loop=loop,
    )


def test_the_interval_of_a_mean_is_students() -> None:
    found = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    # Deviation 1.5811 over the root of 5, times 2.7764 of the table for 4 degrees of freedom.
    assert found["mean"] == 3
    assert found["interval_95"] == pytest.approx([3 - 1.9632, 3 + 1.9632], abs=1e-3)


def test_differences_of_students_are_taken_seed_by_seed() -> None:
    reports = [report(0, 50, 60, 61), report(1, 60, 71, 70), report(2, 70, 82, 82)]
    summary = summarize_runs(reports)
    assert summary["gains"]["logits - sft"]["mean"] == 11
    # Seeds differ by ten points, the gain by one.
    assert np.ptp(summary["gains"]["logits - sft"]["interval_95"]) < 6
    assert np.ptp(summary["accuracy"]["sft"]["average"]["interval_95"]) > 40
    assert summary["gains"]["compodistill - logits"]["mean"] == 0
    assert summary["largest_difference"]["lm"] == pytest.approx(3e-6)
    assert summary["step_ratio"] == pytest.approx({"sft": 1, "logits": 2, "compodistill": 3, "teacher in the loop": 4})
    recorded = RecordedRuns(command="c", date="d", hardware="h", versions={}, **summary)
    assert accuracy_table(reports[0], recorded).rows[-2] == [
        "attention similarity",
        "1.000",
        "0.500 (0.352 to 0.848)",
        "0.600 (0.437 to 0.983)",
        "0.610 (0.448 to 0.972)",
    ]
    loop = reports[0].loop
    assert loop_table(loop, recorded).rows[0] == ["largest difference of lm, relative", "1e-06", "3e-06"]
    assert accuracy_table(reports[0], None).rows[-2] == ["attention similarity", "1.000", "0.500", "0.600", "0.610"]
    assert loop_table(loop, None).rows[0] == ["largest difference of lm, relative", "1e-06"]
