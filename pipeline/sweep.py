"""Several students against one store: trained one after another or at once, compared side by side."""

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from pipeline.attention_comparison import compare_with_targets
from pipeline.checkpoints import find_checkpoint
from pipeline.run_file import RunFile
from pipeline.suite_evaluation import evaluate_suites
from pipeline.sweep_file import SWEEP_REPORT, CompareConfig, Sweep, compared_data
from pipeline.ui.console import is_main_process
from pipeline.ui.tables import OF_LOSSES, ReportTable
from stages.checkpoints.weights import weights_digest
from stages.evaluation.attention.similarity import AttentionSimilarity
from stages.evaluation.config import EvaluationConfig
from stages.evaluation.result import SuiteResult, items_digest
from stages.student.run_folder import StageReport
from stages.student.stage_config import StageName
from storage.errors import StoreUnavailable, UserError
from storage.progress import SILENT, Progress
from storage.samples.sample_set import SampleSet
from storage.stores import Store, open_store
from storage.stores.folder_owner import owned
from storage.streaming.stream import Source
from storage.strict_model import StrictModel
from storage.targets.store import TargetStore

logger = logging.getLogger(__name__)

_COMPARED = "compared.json"
"""Beside a student's stages."""

Training = Callable[[], list[StageReport]]
"""Trains a student, or waits for its training, and gives a report for each of its stages."""
Trainings = AbstractContextManager[Mapping[str, Training]]
"""One for each student, by name; also `pipeline.students_at_once`."""


def in_turn(sweep: Sweep, train: Callable[[str, RunFile], list[StageReport]]) -> Trainings:
    """Trains each student, in this process, when its turn comes."""
    return nullcontext({name: partial(train, name, run) for name, run in sweep.runs.items()})


class SweptStudent(StrictModel):
    """What came of one student."""

    stages: dict[StageName, StageReport]
    """Each stage's report, its final losses among it."""
    suites: dict[str, SuiteResult] = Field(default_factory=dict)
    """Of the suites that were asked for."""
    similarity: AttentionSimilarity | None = None
    """Of its attention to the teacher's, where it was asked for."""

    @property
    def seconds(self) -> float:
        """Training time of all stages."""
        return sum(report.seconds for report in self.stages.values())

    @property
    def samples_per_s(self) -> float:
        """Over all stages."""
        return sum(report.samples for report in self.stages.values()) / max(self.seconds, 1e-9)


class SweepReport(StrictModel):
    """Results side by side; saved as `sweep.json`."""

    students: dict[str, SweptStudent]
    failures: dict[str, str]
    """What stopped those that have no result."""


class _Measured(StrictModel):
    """What figures are of and what they were measured with; by content, since places may hold something else later."""

    compare: CompareConfig
    evaluate: EvaluationConfig
    stage: str
    """The student's last one."""
    weights: str
    """sha256 of the student's."""
    suites: dict[str, str]
    """Digest of each suite's items."""
    targets: dict[str, Any] | None
    """The store whose maps the student is compared with, as `Source.description` says it."""


class _Compared(StrictModel):
    """Figures of a finished student, so that they need not be measured again."""

    measured: _Measured
    suites: dict[str, SuiteResult]
    similarity: AttentionSimilarity | None


def run_sweep(sweep: Sweep, trainings: Trainings, progress: Progress = SILENT) -> SweepReport:
    """Trains and compares all students; one that fails is reported, and the others go on.

    Finished students are not trained again, an interrupted one goes on. Leaves each in `OUTPUT/NAME` and all results in
    `OUTPUT/sweep.json`, which is written after each student.

    Args:
        sweep: the students.
        trainings: entered once the folder is this command's; a student's is called when its turn comes.
        progress: where the work is shown.

    Raises:
        FolderInUse: If another command works in the sweep's folder.
        StoreUnavailable: If a disk is full, or a store does not answer: that is no student's own failure.
    """
    # One process owns it for all that train together; each student's folder has its own owner.
    with owned(sweep.output) if is_main_process else nullcontext(), trainings as train:
        return _run_all(sweep, train, progress)


def _run_all(sweep: Sweep, train: Mapping[str, Training], progress: Progress) -> SweepReport:
    students: dict[str, SweptStudent] = {}
    failures: dict[str, str] = {}
    report = SweepReport(students=students, failures=failures)
    for name, run in sweep.runs.items():
        try:
            reports = {stage.stage: stage for stage in train[name]()}
            students[name] = _compared(run, sweep, reports, progress)
        except StoreUnavailable:
            # Such as a full disk, which no other student would find room on; the same command goes on from here.
            raise
        except UserError as error:
            _raise_if_distributed()
            failures[name] = str(error)
        except Exception as error:
            _raise_if_distributed()
            # Such as too little memory; the other students may still train.
            logger.exception("student %s failed", name)
            failures[name] = f"{type(error).__name__}: {error}"
        report = SweepReport(students=students, failures=failures)
        if is_main_process:
            open_store(sweep.output).write(SWEEP_REPORT, report.to_json().encode())
    return report


def _raise_if_distributed() -> None:
    """Raises the error that is being handled if other processes train too: they are still in this student's step."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise


def _compared(run: RunFile, sweep: Sweep, stages: dict[StageName, StageReport], progress: Progress) -> SweptStudent:
    model, compare = run.output, sweep.compare
    assert model is not None
    if not compare.suites and compare.similarity_samples is None:
        return SweptStudent(stages=stages)
    store, measured = open_store(Path(model)), _measured(run, sweep)
    if (found := _read(store)) is not None and found.measured == measured:
        return SweptStudent(stages=stages, suites=found.suites, similarity=found.similarity)
    suites, similarity = dict[str, SuiteResult](), None
    if compare.suites:
        suites = evaluate_suites(model, sweep.suites, run.evaluate, Path(model) / "suites", progress, replace=True)
    if compare.similarity_samples is not None:
        similarity = compare_with_targets(model, *compared_data(run), compare.similarity_samples, progress)
    made = _Compared(measured=measured, suites=suites, similarity=similarity)
    if is_main_process:
        store.write(_COMPARED, made.to_json().encode())
    return SweptStudent(stages=stages, suites=suites, similarity=similarity)


def _measured(run: RunFile, sweep: Sweep) -> _Measured:
    compare, student = sweep.compare, find_checkpoint(str(run.output))
    targets = None
    if compare.similarity_samples is not None:
        samples, store = compared_data(run)
        targets = Source(SampleSet.open(samples), TargetStore.open(store)).description()
    return _Measured(
        # Of the page nothing is measured.
        compare=compare.model_copy(update={"pictures": None}),
        evaluate=run.evaluate,
        stage=student.parent.name,
        weights=weights_digest(student),
        suites={name: items_digest(suite.all_items) for name, suite in sweep.suites.items()},
        targets=targets,
    )


def _read(store: Store) -> _Compared | None:
    """Figures that are there already; None also for those of another version, which are measured again."""
    try:
        return _Compared.model_validate_json(store.read(_COMPARED)) if store.exists(_COMPARED) else None
    except ValidationError:
        return None


def sweep_table(report: SweepReport) -> ReportTable:
    """A line a student: its last stage's losses, also on held-out samples, time, and what was compared."""
    of_steps = {name: _last_stage(student).losses for name, student in report.students.items()}
    of_held_out = {
        name: {} if (found := _last_stage(student).validation) is None else found.losses
        for name, student in report.students.items()
    }
    terms = sorted({term for found in of_steps.values() for term in found} - {"loss"}, key=_place_of_term)
    header = ["student", "last stage", *terms, *(f"validation {term}" for term in terms)]
    suites = list(dict.fromkeys(name for student in report.students.values() for name in student.suites))
    header += ["seconds", "samples/s", *suites, "similarity"]
    rows = []
    for name, student in report.students.items():
        rows.append(
            [
                name,
                _last_stage(student).stage,
                *(
                    f"{found[term]:.3f}" if term in found else ""
                    for found in (of_steps[name], of_held_out[name])
                    for term in terms
                ),
                f"{student.seconds:.0f}",
                f"{student.samples_per_s:.1f}",
                *(_main(student.suites.get(name)) for name in suites),
                f"{student.similarity.mean:.3f}" if student.similarity is not None else "",
            ]
        )
    rows += [[name, "failed", *[""] * (len(header) - 2)] for name in report.failures]
    # What was not asked for would only make the rest too narrow to read.
    columns = [(head, *cells) for head, *cells in zip(header, *rows, strict=True) if any(cells)]
    header, *rows = map(list, zip(*columns, strict=True))
    about = f"{OF_LOSSES}, validation losses those at its end" if any(of_held_out.values()) else OF_LOSSES
    return ReportTable(f"students side by side; {about}", header, rows)


def _main(result: SuiteResult | None) -> str:
    """Empty where a server has the labels."""
    return f"{result.main.value:.1f}" if result is not None and result.main is not None else ""


def _place_of_term(term: str) -> tuple[int, str]:
    names = ("lm", "kd", "attention")
    return names.index(term) if term in names else len(names), term


def _last_stage(student: SweptStudent) -> StageReport:
    return student.stages[next(reversed(student.stages))]
