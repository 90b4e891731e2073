"""Settings of the demo, what it measured, and how that is shown."""

from pipeline.demo.scenes.world import Variant
from pipeline.ui.tables import ReportTable
from stages.evaluation.result import SuiteResult
from storage.strict_model import StrictModel
from storage.targets.summary import StoreSummary

STUDENTS = ("sft", "logits", "compodistill")


class DemoConfig(StrictModel):
    """How large the demo is, and of what."""

    num_images: int = 1500
    """Training images; about two conversations each."""
    num_pairs: int = 100
    """Held-out caption pairs of each kind."""
    steps: int | None = None
    """Steps of each student's fine-tuning stage; None leaves the recipe's number."""
    variant: Variant = "shapes"
    """What the scenes are made of."""
    students: tuple[str, ...] = STUDENTS
    """Names in `pipeline/demo/students.yaml`."""
    seed: int = 0


class StudentResult(StrictModel):
    """One student of the demo."""

    evaluation: SuiteResult
    similarity: float
    """Mean attention similarity to the teacher over the matched layers."""
    seconds: float
    """Training time."""


class DemoReport(StrictModel):
    """What the demo measured; saved as `report.json`."""

    config: DemoConfig
    seconds: dict[str, float]
    """Of each part."""
    target_bytes: int
    raw_bytes: int
    """The same maps and logits uncoded in fp16."""
    teacher: SuiteResult
    students: dict[str, StudentResult]


def accuracy_table(report: DemoReport) -> ReportTable:
    """Makes the table of accuracy on each kind, models side by side, then what else differs between them."""
    models = {"teacher": report.teacher} | {name: s.evaluation for name, s in report.students.items()}
    students = report.students.values()
    rows = [
        [kind, *(f"{model.metrics[kind]['accuracy'].value:.1f}" for model in models.values())]
        for kind in report.teacher.metrics
    ]
    rows += [
        ["attention similarity", "1.000", *(f"{student.similarity:.3f}" for student in students)],
        ["training, seconds", "", *(f"{student.seconds:.0f}" for student in students)],
    ]
    title = f"accuracy on {report.config.num_pairs} held-out caption pairs a kind, in percent (guessing: 50)"
    return ReportTable(title, ["", *models], rows)


def summary_lines(report: DemoReport, stored: StoreSummary) -> list[str]:
    """Says the size of the targets and the time of each part."""
    parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in report.seconds.items())
    targets = (
        f"targets: {stored.num_samples:,} samples, {stored.num_maps:,} maps, {report.target_bytes / 1e6:.1f} MB "
        f"({report.raw_bytes / report.target_bytes:.1f} times smaller than raw fp16)"
    )
    return [targets, f"seconds: {parts}; {sum(report.seconds.values()):.0f} in all"]
