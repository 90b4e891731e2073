"""Exporting what a training run made: finds the student, and what the run says of it."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.evaluation import find_checkpoint
from pipeline.run_file import read_document
from stages.checkpoints import hide_loading_bars, in_hub_cache
from stages.evaluation.report import EvaluationReport
from stages.export.export import Dtype, export_student
from stages.export.model_card import ExportReport, ModelNames
from stages.student.run_folder import RunFolder, StageFolder
from storage.errors import UserError


def export(
    model: str,
    output: Path,
    *,
    fold: bool = True,
    dtype: Dtype | None = None,
    teacher: str | None = None,
    evaluation: Path | None = None,
) -> ExportReport:
    """A self-contained Hugging Face folder of a training run's last student, or of a checkpoint.

    Args:
        model: training run, checkpoint folder or hub id.
        output: new folder.
        fold: see `export_student`.
        dtype: see `export_student`.
        teacher: how the card names the teacher; None takes the name in the run's own run file, where it has one.
        evaluation: report of `cdp evaluate`, for the card.

    Raises:
        UserError: no finished stage, an unreadable report, or what `export_student` raises.
    """
    hide_loading_bars()
    folder = find_checkpoint(model)
    report = None if evaluation is None else _read_evaluation(evaluation)
    names = _names_of(folder, teacher)
    return export_student(folder, output, fold=fold, dtype=dtype, names=names, evaluation=report)


def _names_of(student: Path, teacher: str | None) -> ModelNames:
    stage = StageFolder.of_student(student)
    path = RunFolder(stage.path.parent).run_file
    # Who gives the flag says where others find it; names in a run file may be folders of the machine that trained.
    given = {teacher} if teacher is not None and teacher.count("/") == 1 and not Path(teacher).exists() else set()
    if not (path.is_file() and stage.is_begun):
        return ModelNames(teacher=teacher, hub_ids=frozenset(given))
    # Two names are all that is wanted of it: one of another version, or damaged since, is no reason to export nothing.
    try:
        document = read_document(path)
    except UserError:
        document = {}
    section = document.get("teacher")
    checkpoint = section.get("checkpoint") if isinstance(section, dict) else None
    names = _name(document.get("student")), teacher or _name(checkpoint)
    known = {name for name in names if name is not None and not Path(name).exists() and in_hub_cache(name)}
    return ModelNames(*names, hub_ids=frozenset(known | given))


def _name(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _read_evaluation(path: Path) -> EvaluationReport:
    try:
        return EvaluationReport.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f"{path} is no report of `cdp evaluate --report`: {error}") from error
