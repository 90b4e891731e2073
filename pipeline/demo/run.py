"""Runs the demo: one pass of the teacher, several students from its targets, and what they cost and learn.

Every number is measured in the run that prints it. The settings are the recipe `pipeline/configs/demo.yaml` and the
students of `pipeline/demo/students.yaml`.
"""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from pipeline.demo.assets import STUDENT_LM, TEACHER
from pipeline.demo.assets import STUDENTS as STUDENTS_FILE
from pipeline.demo.loop_comparison import compare_with_loop
from pipeline.demo.recorded import RecordedRuns, accuracy_table, loop_table
from pipeline.demo.report import DemoConfig, DemoReport, StudentResult, summary_lines
from pipeline.demo.scenes.dataset import write_dataset
from pipeline.extraction.extract import extract
from pipeline.report.build import ReportInputs, build_page
from pipeline.report.page import Facts
from pipeline.run_file import load_run_file
from pipeline.students_at_once import students_at_once
from pipeline.suite_evaluation import evaluate_suites
from pipeline.sweep import SweepReport, run_sweep
from pipeline.sweep_file import CompareConfig, Sweep, load_sweep
from pipeline.ui.console import results
from pipeline.ui.progress import progress_display
from pipeline.ui.report.render import render_page
from pipeline.ui.tables import ReportTable, print_table
from stages.evaluation.config import EvaluationConfig, SuiteConfig
from stages.evaluation.loaded_suite import load_suite
from stages.samples.pack import PackConfig, pack_samples
from stages.settings import refuse_other_settings
from storage.digests import parse_object
from storage.errors import UserError, disk_errors_named
from storage.progress import Progress
from storage.stores import open_store
from storage.stores.folder_owner import owned
from storage.targets.manifest import MANIFEST_PATH
from storage.targets.summary import summarize

RECIPE = Path("demo")
REPORT = "report.json"
COMPARED_SAMPLES = 256
PICTURES = 8
SUITE = "sugarcrepe"
"""Whose layout the held-out pairs have."""


def run_demo(folder: Path, config: DemoConfig) -> DemoReport:
    """Packs scenes, extracts with the bundled teacher through Ray, trains students, evaluates all; prints tables.

    A finished or interrupted demo in `folder` goes on from there.

    Raises:
        UserError: If `folder` holds a demo with other settings or another one runs there, or a student failed.
    """
    with disk_errors_named(folder), owned(folder):
        report = _measured(folder, config)
        recorded = RecordedRuns.read()
        tables = [accuracy_table(report, recorded), loop_table(report.loop, recorded)]
        for table in tables:
            print_table(table)
        for line in summary_lines(report, summarize(folder / "targets")):
            results.print(line)
        _save(folder, report)
        _save_page(folder, config, tables)
        return report


def measure_demo(folder: Path, config: DemoConfig) -> DemoReport:
    """As `run_demo`, but only saves the report."""
    with disk_errors_named(folder), owned(folder):
        report = _measured(folder, config)
        _save(folder, report)
        return report


def _measured(folder: Path, config: DemoConfig) -> DemoReport:
    _check_settings(folder, config)
    with progress_display() as progress:
        return _measure(folder, config, progress)


def _save(folder: Path, report: DemoReport) -> None:
    open_store(folder).write(REPORT, report.to_json().encode())


def _save_page(folder: Path, config: DemoConfig, tables: list[ReportTable]) -> None:
    inputs = ReportInputs(
        runs=[folder / "students" / name for name in config.students],
        teacher_results=[folder / "teacher"],
        samples=str(folder / "samples"),
        targets=str(folder / "targets"),
        teacher=str(TEACHER),
        num_pictures=PICTURES,
    )
    page = build_page(inputs, "cdp demo: one pass of the teacher, several students")
    shown = tuple(Facts(table.title, tuple(table.header), tuple(map(tuple, table.rows))) for table in tables)
    html = render_page(replace(page, facts=shown + page.facts))
    open_store(folder).write("report.html", html.encode())
    results.print(f"report with pictures: {folder / 'report.html'}")


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
        _extract(folder, progress)
    with clock.part("evaluate teacher"):
        loaded = {name: load_suite(name, suite) for name, suite in _suites(folder).items()}
        teacher = evaluate_suites(str(TEACHER), loaded, EvaluationConfig(), folder / "teacher", progress)[SUITE]
    with clock.part("train and evaluate students"):
        sweep = _sweep_of(folder, config)
        # All at once, since so small a student does not keep two cores busy.
        swept = run_sweep(sweep, students_at_once(sweep, len(sweep.runs), progress), progress)
        students = _results(swept)
    with clock.part("compare with the teacher in the loop"):
        first_and_last = list(dict.fromkeys([config.students[0], config.students[-1]]))
        loop = compare_with_loop(sweep.runs, first_and_last, config.loop_steps, progress)
    stored = summarize(targets)
    return DemoReport(
        config=config,
        seconds=clock.seconds,
        target_bytes=stored.total_bytes,
        raw_bytes=stored.raw_square_bytes + stored.raw_logit_bytes,
        teacher=teacher,
        students=students,
        loop=loop,
    )


def _extract(folder: Path, progress: Progress) -> None:
    """Extracts with a copy of the teacher, which is gone before the first student trains."""
    teacher, targets = folder / "teacher-checkpoint", folder / "targets"
    run = load_run_file(RECIPE, [], {"teacher.checkpoint": str(teacher)})
    assert run.teacher is not None
    if not _is_complete(targets):
        shutil.rmtree(teacher, ignore_errors=True)
        shutil.copytree(TEACHER, teacher)
        extract(run.teacher, str(folder / "samples"), str(targets), run.extract, progress, images=run.images)
    shutil.rmtree(teacher, ignore_errors=True)


def _is_complete(targets: Path) -> bool:
    if not open_store(targets).exists(MANIFEST_PATH):
        return False
    summary = summarize(targets)
    return summary.num_committed == summary.num_planned


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
        held_out = student.stages["dft"].validation
        assert student.similarity is not None
        assert held_out is not None
        results[name] = StudentResult(
            evaluation=student.suites[SUITE],
            similarity=student.similarity.mean,
            held_out_lm=held_out.losses["lm"],
            seconds=student.seconds,
        )
    return results
