"""The demo with several seeds, each with scenes of its own: what it shows, with intervals over runs.

A run that is interrupted goes on from where it was.

    python -m benchmarks.demo_seeds WORK
"""

import argparse
import statistics
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from benchmarks.intervals import estimate
from benchmarks.results import command_line, median_ratio, save_result
from pipeline.demo.recorded import RECORDED, RecordedRuns, recorded_table
from pipeline.demo.report import DemoConfig, DemoReport
from pipeline.demo.run import REPORT, measure_demo
from pipeline.ui.tables import markdown_table


def summarize_runs(reports: Sequence[DemoReport]) -> dict[str, Any]:
    """What `RecordedRuns` says of them, without their command and hardware."""
    first, loops = reports[0], [one.loop for one in reports]
    kinds, students = list(first.teacher.metrics), list(first.students)
    gains = {
        f"{more} - {less}": [_accuracy(one, more, "average") - _accuracy(one, less, "average") for one in reports]
        for less, more in combinations(students, 2)
    }
    return {
        "settings": first.config.model_dump(mode="json", exclude={"seed"}),
        "seeds": [one.config.seed for one in reports],
        "accuracy": {
            model: {kind: estimate([_accuracy(one, model, kind) for one in reports]) for kind in kinds}
            for model in ["teacher", *students]
        },
        "gains": {pair: estimate(values) for pair, values in gains.items()},
        "similarity": {name: estimate([one.students[name].similarity for one in reports]) for name in students},
        "held_out_lm": {name: estimate([one.students[name].held_out_lm for one in reports]) for name in students},
        "step_s": {name: statistics.median(one.step_s[name] for one in loops) for name in loops[0].step_s},
        "step_ratio": {
            name: median_ratio([one.step_s[name] for one in loops], [one.step_s[students[0]] for one in loops])
            for name in loops[0].step_s
        },
        "largest_difference": {
            term: max(one.largest_difference[term] for one in loops) for term in loops[0].largest_difference
        },
    }


def _accuracy(report: DemoReport, model: str, kind: str) -> float:
    result = report.teacher if model == "teacher" else report.students[model].evaluation
    return result.metrics[kind]["accuracy"].value


def report_of(folder: Path, config: DemoConfig) -> DemoReport:
    """That of the finished run in the folder, else of one that is made, or gone on with, there."""
    saved = folder / REPORT
    if saved.is_file() and (report := DemoReport.model_validate_json(saved.read_text())).config == config:
        return report
    return measure_demo(folder, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for the runs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", type=int, help="make the run of this seed and no record")
    parser.add_argument("--out", type=Path, default=RECORDED)
    flags = parser.parse_args()
    if flags.only is not None:
        report_of(flags.work / str(flags.only), DemoConfig(seed=flags.only))
        return
    reports = [report_of(flags.work / str(seed), DemoConfig(seed=seed)) for seed in range(flags.seeds)]
    save_result(flags.out, torch.device("cpu"), command_line("benchmarks.demo_seeds"), summarize_runs(reports))
    print(markdown_table(recorded_table(RecordedRuns.model_validate_json(flags.out.read_text()))))


if __name__ == "__main__":
    main()
