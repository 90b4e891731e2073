"""The demo: the whole pipeline on the bundled example, ending in one table of what attention distillation did.

Every number is measured in the run that prints it; the settings are the recipe `pipeline/configs/demo.yaml` and the
students of `pipeline/demo/students.yaml`.
"""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.demo.assets import STUDENT_LM, TEACHER
from pipeline.demo.assets import STUDENTS as STUDENTS_FILE
from pipeline.demo.scenes.dataset import write_dataset
from pipeline.demo.scenes.world import Variant
from pipeline.evaluation import attention_pictures, evaluate_checkpoint
from pipeline.extraction import extract
from pipeline.run_file import load_run_file
from pipeline.sweep import SweepReport, run_sweep
from pipeline.sweep_file import CompareConfig, Sweep, load_sweep
from pipeline.training import train
from pipeline.ui.console import results
from pipeline.ui.html_report import render_report
from pipeline.ui.progress import NamedProgress, progress_display
from pipeline.ui.tables import ReportTable, print_report_table
from stages.evaluation.report import EvaluationReport
from stages.samples.pack import PackConfig, pack_samples
from stages.settings import refuse_other_settings
from storage.errors import UserError
from storage.stores import open_store
from storage.strict_model import StrictModel
from storage.targets.summary import StoreSummary, summarize

STUDENTS = ("sft", "logits", "compodistill")
RECIPE = Path("demo")
COMPARED_SAMPLES = 256
PICTURES = 8


class DemoConfig(StrictModel):
    """How large the demo is."""

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

    evaluation: EvaluationReport
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
    teacher: EvaluationReport
    students: dict[str, StudentResult]


def run_demo(folder: Path, config: DemoConfig) -> DemoReport:
    """Packs scenes, extracts with the bundled teacher through Ray, trains students, evaluates all.

    A finished or interrupted demo in `folder` goes on from there; with other settings it is refused.
    """
    _claim(folder, config)
    clock = _Clock()
    samples, targets = folder / "samples", folder / "targets"
    with progress_display() as progress:
        with clock.part("draw scenes"):
            if not (folder / "scenes" / "train.json").is_file():
                shutil.rmtree(folder / "scenes", ignore_errors=True)
                write_dataset(folder / "scenes", config.num_images, config.seed, config.variant, config.num_pairs)
        with clock.part("pack samples"):
            if not (samples / "index.json").is_file():
                pack_samples(
                    folder / "scenes" / "train.json",
                    folder / "scenes",
                    samples,
                    PackConfig(max_samples_per_shard=256),
                    progress,
                )
        with clock.part("extract teacher"):
            run = load_run_file(RECIPE, [], {"teacher.checkpoint": str(TEACHER)})
            assert run.teacher is not None
            extract(run.teacher, str(samples), str(targets), run.extract, progress)
        pairs = folder / "scenes" / "pairs"
        with clock.part("evaluate teacher"):
            teacher = evaluate_checkpoint(str(TEACHER), pairs, None, run.evaluate, None, progress)
        with clock.part("train and evaluate students"):
            swept = run_sweep(
                _students(folder, config),
                lambda name, student: train(student, student.train.stages, NamedProgress(name, progress)),
                progress,
            )
        students = _results(swept)
    stored = summarize(targets)
    report = DemoReport(
        config=config,
        seconds=clock.seconds,
        target_bytes=stored.total_bytes,
        raw_bytes=stored.raw_square_bytes + stored.raw_logit_bytes,
        teacher=teacher,
        students=students,
    )
    open_store(folder).write("report.json", report.model_dump_json(indent=1).encode())
    models = {name: str(folder / "students" / name) for name in config.students}
    pictures = attention_pictures(models, str(samples), str(targets), PICTURES)
    table = accuracy_table(report)
    page = render_report("cdp demo: what attention distillation did", [table], pictures)
    open_store(folder).write("report.html", page.encode())
    print_report_table(table)
    for line in summary_lines(report, stored):
        results.print(line)
    results.print(f"pictures: {folder / 'report.html'}")
    return report


class _Clock:
    """Seconds of each part of the demo."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


def _claim(folder: Path, config: DemoConfig) -> None:
    store = open_store(folder)
    wanted = json.loads(config.model_dump_json())
    if not store.exists("demo.json"):
        store.write("demo.json", json.dumps(wanted, indent=1).encode())
    found, instead = json.loads(store.read("demo.json")), "remove the folder or name another with --output"
    refuse_other_settings(str(folder), found, wanted, "with other settings", instead)


def _students(folder: Path, config: DemoConfig) -> Sweep:
    flags = {
        "samples": str(folder / "samples"),
        "targets": str(folder / "targets"),
        "student": str(STUDENT_LM),
        "output": str(folder / "students"),
        "train.seed": config.seed,
        "train.dft.max_steps": config.steps,
    }
    sweep = load_sweep(STUDENTS_FILE, None, [], flags)
    compare = CompareConfig(pairs=folder / "scenes" / "pairs", similarity_samples=COMPARED_SAMPLES)
    return Sweep(sweep.output, {name: sweep.runs[name] for name in config.students}, compare)


def _results(swept: SweepReport) -> dict[str, StudentResult]:
    if swept.failures:
        raise UserError("\n".join(f"student {name} failed: {reason}" for name, reason in swept.failures.items()))
    results = {}
    for name, student in swept.students.items():
        assert student.evaluation is not None
        assert student.similarity is not None
        results[name] = StudentResult(
            evaluation=student.evaluation, similarity=student.similarity.mean, seconds=student.seconds
        )
    return results


def accuracy_table(report: DemoReport) -> ReportTable:
    """Accuracy of each kind, models side by side, then what else differs between them."""
    models = {"teacher": report.teacher} | {name: s.evaluation for name, s in report.students.items()}
    students = report.students.values()
    rows = [
        [kind, *(f"{100 * model.kinds[kind].accuracy:.1f}" for model in models.values())]
        for kind in report.teacher.kinds
    ]
    rows += [
        ["average", *(f"{100 * model.average:.1f}" for model in models.values())],
        ["attention similarity", "1.000", *(f"{student.similarity:.3f}" for student in students)],
        ["training, seconds", "", *(f"{student.seconds:.0f}" for student in students)],
    ]
    title = f"accuracy on {report.config.num_pairs} held-out caption pairs a kind, in percent (guessing: 50)"
    return ReportTable(title, ["", *models], rows)


def summary_lines(report: DemoReport, stored: StoreSummary) -> list[str]:
    """Size of the targets, time of each part."""
    parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in report.seconds.items())
    return [
        (
            f"targets: {stored.num_samples:,} samples, {stored.num_maps:,} maps, {report.target_bytes / 1e6:.1f} MB "
            f"({report.raw_bytes / report.target_bytes:.1f} times smaller than raw fp16)"
        ),
        f"seconds: {parts}; {sum(report.seconds.values()):.0f} in all",
    ]
