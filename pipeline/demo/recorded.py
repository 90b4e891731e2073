"""What runs of the demo with several seeds gave; where they were recorded, a run is shown beside them."""

from pathlib import Path
from typing import Final

from pipeline.demo.loop_comparison import LoopComparison
from pipeline.demo.report import DemoReport, DemoSettings
from pipeline.ui.tables import ReportTable
from storage.regular_files import read_regular
from storage.strict_model import StrictModel

RECORDED: Final = Path(__file__).with_name("recorded.json")
"""Made by `python -m benchmarks.demo_seeds`."""

HELD_OUT = "loss of held-out answers"


class Estimate(StrictModel):
    """A mean over runs of several seeds."""

    mean: float
    interval_95: tuple[float, float]
    """Of the mean, by Student's t."""

    def interval(self, form: str) -> str:
        """From where to where."""
        return " to ".join(format(end, form) for end in self.interval_95)


class RecordedRuns(StrictModel):
    """Saved as `recorded.json`."""

    command: str
    date: str
    hardware: str
    versions: dict[str, str]
    settings: DemoSettings
    seeds: tuple[int, ...]
    accuracy: dict[str, dict[str, Estimate]]
    """By model and kind, in percent."""
    gains: dict[str, Estimate]
    """Difference of two students' average accuracy, seed by seed, such as `logits - sft`."""
    similarity: dict[str, Estimate]
    held_out_lm: dict[str, Estimate]
    """As in `StudentResult`."""
    step_s: dict[str, float]
    """As in `LoopComparison`, medians."""
    step_ratio: dict[str, float]
    """Medians of the ratio to the first student's in the same run."""
    largest_difference: dict[str, float]
    """As in `LoopComparison`, the largest of all runs."""

    @classmethod
    def read(cls) -> "RecordedRuns | None":
        """Those that come with the project, if it has any."""
        return cls.model_validate_json(read_regular(RECORDED)) if RECORDED.is_file() else None


def accuracy_table(report: DemoReport, recorded: RecordedRuns | None) -> ReportTable:
    """Makes the table of accuracy on each kind, models side by side, then what else differs between them."""
    models = {"teacher": report.teacher} | {name: s.evaluation for name, s in report.students.items()}

    def accuracy(name: str, kind: str) -> str:
        value = models[name].metrics[kind]["accuracy"].value
        return _beside(value, ".1f", recorded.accuracy[name][kind] if recorded else None)

    rows = [[kind, *(accuracy(name, kind) for name in models)] for kind in report.teacher.metrics]
    similarity = [
        _beside(student.similarity, ".3f", recorded.similarity[name] if recorded else None)
        for name, student in report.students.items()
    ]
    held_out = [
        _beside(student.held_out_lm, ".3f", recorded.held_out_lm[name] if recorded else None)
        for name, student in report.students.items()
    ]
    title = f"accuracy in percent on {report.config.num_pairs} held-out caption pairs a kind (guessing: 50)"
    if recorded:
        title += f"; in brackets the 95 % interval of the mean of {len(recorded.seeds)} recorded runs"
    rows += [
        [HELD_OUT, "", *held_out],
        ["attention similarity", "1.000", *similarity],
        ["training, seconds", "", *(f"{student.seconds:.0f}" for student in report.students.values())],
    ]
    return ReportTable(title, ["", *models], rows)


def _beside(value: float, form: str, recorded: Estimate | None) -> str:
    return f"{value:{form}} ({recorded.interval(form)})" if recorded else f"{value:{form}}"


def recorded_table(recorded: RecordedRuns) -> ReportTable:
    """Makes the table of the recorded runs alone: means, and their 95 % intervals in brackets."""

    def shown(estimate: Estimate, form: str) -> str:
        return f"{estimate.mean:{form}} ({estimate.interval(form)})"

    models = list(recorded.accuracy)
    kinds = list(recorded.accuracy["teacher"])
    rows = [[kind, *(shown(recorded.accuracy[name][kind], ".1f") for name in models)] for kind in kinds]
    students = models[1:]
    rows += [
        [HELD_OUT, "", *(shown(recorded.held_out_lm[name], ".3f") for name in students)],
        ["attention similarity", "1.000", *(shown(recorded.similarity[name], ".3f") for name in students)],
        [
            "milliseconds a step",
            "",
            *(f"{recorded.step_s[name] * 1000:.0f}" if name in recorded.step_s else "" for name in students),
        ],
    ]
    return ReportTable(f"accuracy in percent, mean of {len(recorded.seeds)} runs", ["", *models], rows)


def loop_table(loop: LoopComparison, recorded: RecordedRuns | None) -> ReportTable:
    """Makes the table of what stored targets change of the losses and of the time that a step takes."""
    rows = [
        [f"largest difference of {term}, relative", f"{value:.0e}"]
        + ([f"{recorded.largest_difference[term]:.0e}"] if recorded else [])
        for term, value in loop.largest_difference.items()
    ]
    rows += [
        [f"milliseconds a step, {name}", f"{value * 1000:.0f}"]
        + ([f"{recorded.step_s[name] * 1000:.0f}"] if recorded else [])
        for name, value in sorted(loop.step_s.items(), key=lambda one: one[1])
    ]
    title = f"training from the store against the teacher in the loop, {loop.steps} steps"
    return ReportTable(title, ["", "this run", *(["recorded runs"] if recorded else [])], rows)
