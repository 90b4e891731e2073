"""Exporting what a training run made: finds the student, and what the run says of it."""

from pathlib import Path

from pydantic import ValidationError

from pipeline.evaluation import find_checkpoint
from pipeline.run_file import load_run_file
from stages.checkpoints import hide_loading_bars
from stages.evaluation.report import EvaluationReport
from stages.student.card import ExportReport, ModelNames
from stages.student.export import export_student
from storage.errors import UserError


def export(
    model: str, output: Path, *, fold: bool = True, teacher: str | None = None, evaluation: Path | None = None
) -> ExportReport:
    """A self-contained Hugging Face folder of a training run's last student, or of a checkpoint.

    Args:
        model: training run, checkpoint folder or hub id.
        output: new folder.
        fold: see `export_student`.
        teacher: how the card names the teacher; None takes the name in the run's own run file, where it has one.
        evaluation: report of `cdp evaluate`, for the card.

    Raises:
        UserError: no finished stage, an unreadable report, or what `export_student` raises.
    """
    hide_loading_bars()
    folder = find_checkpoint(model)
    report = None if evaluation is None else _read_evaluation(evaluation)
    return export_student(folder, output, fold=fold, names=_names_of(folder, teacher), evaluation=report)


def _names_of(student: Path, teacher: str | None) -> ModelNames:
    path = student.absolute().parent.parent / "run.yaml"
    if not path.is_file():
        return ModelNames(teacher=teacher)
    run = load_run_file(path, [], {})
    return ModelNames(run.student, teacher or (None if run.teacher is None else run.teacher.checkpoint))


def _read_evaluation(path: Path) -> EvaluationReport:
    try:
        return EvaluationReport.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f"{path} is no report of `cdp evaluate --report`: {error}") from error
