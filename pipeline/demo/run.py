"""Runs the demo: the whole pipeline on the bundled example, with one table of what attention distillation did.

Every number is measured in the run that prints it. The settings are the recipe `pipeline/configs/demo.yaml` and the
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
from pipeline.demo.report import DemoConfig, DemoReport, StudentResult, accuracy_table, summary_lines
from pipeline.demo.scenes.dataset import write_dataset
from pipeline.extraction.extract import extract
from pipeline.report.build import ReportInputs, build_page
from pipeline.run_file import load_run_file
from pipeline.suite_evaluation import evaluate_suites
from pipeline.sweep import SweepReport, run_sweep
from pipeline.sweep_file import CompareConfig, Sweep, load_sweep
from pipeline.training import train
from pipeline.ui.console import results
from pipeline.ui.progress import NamedProgress, progress_display
from pipeline.ui.report.render import render_page
from pipeline.ui.tables import print_table
from stages.evaluation.config import SuiteConfig
from stages.evaluation.loaded_suite import load_suite
from stages.samples.pack import PackConfig, pack_samples
from stages.settings import refuse_other_settings
from storage.digests import parse_object
from storage.errors import UserError, disk_errors_named
from storage.progress import Progress
from storage.stores import open_store
from storage.stores.folder_owner import owned
from storage.targets.summary import summarize

RECIPE = Path("demo")
COMPARED_SAMPLES = 256
PICTURES = 8
SUITE = "sugarcrepe"
"""Whose layout the held-out pairs have."""


def run_demo(folder: Path, config: DemoConfig) -> DemoReport:
    """Packs scenes, extracts with the bundled teacher through Ray, trains students, evaluates all, prints the table.

    A finished or interrupted demo in `folder` goes on from there.

    Raises:
        UserError: If `folder` holds a demo with other settings or another one runs there, or a student failed.
    """
    with disk_errors_named(folder), owned(folder):
        _check_settings(folder, config)
        return _run(folder, config)


def _run(folder: Path, config: DemoConfig) -> DemoReport:
    with progress_display() as progress:
        report = _measure(folder, config, progress)
    print_table(accuracy_table(report))
    for line in summary_lines(report, summarize(folder / "targets")):
        results.print(line)
    open_store(folder).write("report.json", report.to_json().encode())
    inputs = ReportInputs(
        runs=[folder / "students" / name for name in config.students],
        teacher_results=[folder / "teacher"],
        samples=str(folder / "samples"),
        targets=str(folder / "targets"),
        teacher=str(TEACHER),
        num_pictures=PICTURES,
    )
    html = render_page(build_page(inputs, "cdp demo: what attention distillation did"))
    open_store(folder).write("report.html", html.encode())
    results.print(f"report with pictures: {folder / 'report.html'}")
    return report


def _measure(folder: Path, config: DemoConfig, progress: Progress) -> DemoReport:
    clock = _Clock()
    scenes, samples, targets = folder / "scenes", folder / "samples", folder / "targets"
    with clock.part("draw scenes"):
        if not (scenes / "train.json").is_file():
            shutil.rmtree(scenes, ignore_errors=True)
            write_dataset(scenes, config.num_images, config.seed, config.variant, config.num_pairs)
    with clock.part("pack samples"):
        if not (samples / "index.json").is_file():
            pack_samples(scenes / "train.json", scenes, samples, PackConfig(max_samples_per_shard=256), progress)
    with clock.part("extract teacher"):
        run = load_run_file(RECIPE, [], {"teacher.checkpoint": str(TEACHER)})
        assert run.teacher is not None
        extract(run.teacher, str(samples), str(targets), run.extract, progress, images=run.images)
    with clock.part("evaluate teacher"):
        loaded = {name: load_suite(name, suite) for name, suite in _suites(folder).items()}
        teacher = evaluate_suites(str(TEACHER), loaded, run.evaluate, folder / "teacher", progress)[SUITE]
    with clock.part("train and evaluate students"):
        swept = run_sweep(
            _sweep_of(folder, config),
            lambda name, student: train(student, student.train.stages, NamedProgress(name, progress)),
            progress,
        )
    stored = summarize(targets)
    return DemoReport(
        config=config,
        seconds=clock.seconds,
        target_bytes=stored.total_bytes,
        raw_bytes=stored.raw_square_bytes + stored.raw_logit_bytes,
        teacher=teacher,
        students=_results(swept),
    )


class _Clock:
    """Seconds of each part of the demo."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


def _check_settings(folder: Path, config: DemoConfig) -> None:
    store = open_store(folder)
    wanted = json.loads(config.model_dump_json())
    if not store.exists("demo.json"):
        store.write("demo.json", json.dumps(wanted, indent=1).encode())
    instead = "remove the folder or name another with --output"
    found = parse_object(store.read("demo.json"), f"{store.url}/demo.json", instead)
    refuse_other_settings(str(folder), found, wanted, "with other settings", instead)


def _sweep_of(folder: Path, config: DemoConfig) -> Sweep:
    flags = {
        "samples": str(folder / "samples"),
        "targets": str(folder / "targets"),
        "student": str(STUDENT_LM),
        "output": str(folder / "students"),
        "train.seed": config.seed,
        "train.dft.max_steps": config.steps,
    }
    sweep = load_sweep(STUDENTS_FILE, None, [], flags)
    compare = CompareConfig(suites=_suites(folder), similarity_samples=COMPARED_SAMPLES)
    return Sweep(sweep.output, {name: sweep.runs[name] for name in config.students}, compare)


def _suites(folder: Path) -> dict[str, SuiteConfig]:
    return {SUITE: SuiteConfig(data=folder / "scenes" / "pairs")}


def _results(swept: SweepReport) -> dict[str, StudentResult]:
    if swept.failures:
        raise UserError("\n".join(f"student {name} failed: {reason}" for name, reason in swept.failures.items()))
    results = {}
    for name, student in swept.students.items():
        assert student.similarity is not None
        results[name] = StudentResult(
            evaluation=student.suites[SUITE], similarity=student.similarity.mean, seconds=student.seconds
        )
    return results
