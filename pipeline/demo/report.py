"""Settings of the demo, what it measured, and how that is shown."""

from pipeline.demo.loop_comparison import LoopComparison
from pipeline.demo.scenes.world import Variant
from stages.evaluation.result import SuiteResult
from storage.strict_model import StrictModel
from storage.targets.summary import StoreSummary

STUDENTS = ("sft", "logits", "compodistill")


class DemoSettings(StrictModel):
    """How large the demo is, and of what."""

    num_images: int = 400
    """Training images; about two conversations each. So few that answers alone are learned by heart."""
    num_pairs: int = 100
    """Held-out caption pairs of each kind."""
    steps: int | None = None
    """Steps of each student's fine-tuning stage; None leaves the recipe's number."""
    variant: Variant = "shapes"
    """What the scenes are made of."""
    students: tuple[str, ...] = STUDENTS
    """Names in `pipeline/demo/students.yaml`."""
    loop_steps: int = 20
    """Steps that are taken again with the teacher in the loop."""


class DemoConfig(DemoSettings):
    """A demo; its scenes, and the order and the first weights of training, are of this seed."""

    seed: int = 0


class StudentResult(StrictModel):
    """One student of the demo."""

    evaluation: SuiteResult
    similarity: float
    """Mean attention similarity to the teacher over the matched layers."""
    held_out_lm: float
    """Mean cross-entropy of the answers of conversations that were held out, in nats a token."""
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
    loop: LoopComparison


def summary_lines(report: DemoReport, stored: StoreSummary) -> list[str]:
    """Says the size of the targets and the time of each part."""
    parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in report.seconds.items())
    targets = (
        f"targets: {stored.num_samples:,} samples, {stored.num_maps:,} maps, {report.target_bytes / 1e6:.1f} MB "
        f"({report.raw_bytes / report.target_bytes:.1f} times smaller than raw fp16)"
    )
    return [targets, f"seconds: {parts}; {sum(report.seconds.values()):.0f} in all"]
