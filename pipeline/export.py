"""Exports a training run's student: finds it, and the names of its models for the card."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pipeline.checkpoints import find_checkpoint
from pipeline.run_file import read_document
from stages.checkpoints.processors import hide_loading_bars
from stages.checkpoints.resolve import in_hub_cache
from stages.evaluation.result import read_result
from stages.export.export import Dtype, export_student
from stages.export.gguf_export import GgufReport, export_gguf
from stages.export.model_card import ExportReport, ModelNames
from stages.student.run_folder import RunFolder, StageFolder
from storage.errors import UserError
from storage.progress import SILENT, Progress

Format = Literal["huggingface", "gguf"]


def export(
    model: str,
    output: Path,
    *,
    fold: bool = True,
    dtype: Dtype | None = None,
    teacher: str | None = None,
    evaluations: Sequence[Path] = (),
    file_format: Format = "huggingface",
    progress: Progress = SILENT,
) -> ExportReport | GgufReport:
    """A self-contained Hugging Face folder of a training run's last student, or of a checkpoint.

    Args:
        model: Training run, checkpoint folder or hub id.
        output: New folder.
        fold: As of `export_student`.
        dtype: As of `export_student`.
        teacher: The teacher's name on the card; None takes the name in the run's own run file.
        evaluations: Results of `cdp evaluate`, for the card.
        file_format: `gguf` writes the files of `export_gguf` instead, always folded.
        progress: Shows the steps.

    Raises:
        UserError: If no stage has finished or the report cannot be read; or as `export_student` and `export_gguf`.
    """
    hide_loading_bars()
    folder = find_checkpoint(model)
    results = [read_result(path) for path in evaluations]
    names = _names_of(folder, teacher)
    if file_format == "gguf":
        if not fold:
            raise UserError("llama.cpp has no layer for a post-connector that is not folded; leave out --no-fold")
        return export_gguf(folder, output, dtype=dtype, names=names, evaluations=results, progress=progress)
    return export_student(folder, output, fold=fold, dtype=dtype, names=names, evaluations=results, progress=progress)


def _names_of(student: Path, teacher: str | None) -> ModelNames:
    stage = StageFolder.of_student(student)
    path = RunFolder(stage.path.parent).run_file
    # The flag names a model for others; names in a run file may be folders of the machine that trained.
    given = {teacher} if teacher is not None and teacher.count("/") == 1 and not Path(teacher).exists() else set()
    if not (path.is_file() and stage.is_begun):
        return ModelNames(teacher=teacher, hub_ids=frozenset(given))
    # Only two names are read from it, so that a damaged file or one of another version does not stop the export.
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
