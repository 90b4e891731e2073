"""`cdp export`."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.options import say_which_student

if TYPE_CHECKING:
    from stages.export.model_card import ExportReport


class Dtype(StrEnum):
    """Values of `--dtype`."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


def export(
    model: Annotated[str, typer.Argument(help="Training run or checkpoint.", metavar="RUN_OR_CHECKPOINT")],
    output: Annotated[Path, typer.Argument(help="New folder.", metavar="OUT")],
    fold: Annotated[bool, typer.Option(help="Fold the post-connector into the projector, where exact.")] = True,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the weights; default: as trained, float32 of a training run.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="How the model card names the teacher.")] = None,
    evaluation: Annotated[Path | None, typer.Option(help="Report of `cdp evaluate`, for the card.")] = None,
) -> None:
    """Writes a student as a Hugging Face folder. It has a model card and needs transformers only."""
    from pipeline.export import export as export_folder
    from pipeline.ui.progress import progress_display

    say_which_student(model)
    settings: dict[str, Any] = {"fold": fold, "dtype": None if dtype is None else dtype.value}
    with progress_display() as progress:
        report = export_folder(model, output, **settings, teacher=teacher, evaluation=evaluation, progress=progress)
    _print_report(report, output)


def _print_report(report: "ExportReport", folder: Path) -> None:
    from pipeline.ui.console import results
    from pipeline.ui.tables import facts_table, size_text

    table = facts_table("export", str(folder))
    code = f" of {report.custom_code} in it (trust_remote_code=True)" if report.custom_code else " of transformers"
    table.add_row("class", report.model_class + code)
    table.add_row("weights", f"{report.parameters:,} parameters, {report.dtype}, {size_text(report.bytes)}")
    table.add_row("post-connector", report.post_connector)
    rounded = ""
    if report.dtype != report.trained_dtype:
        rounded = f" ({report.rounding_error:.2g} by rounding from {report.trained_dtype} alone)"
    table.add_row("logits", f"{report.logit_error:.2g} off at most{rounded}, the largest is {report.logit_scale:.3g}")
    table.add_row("image token", f"{report.image_token_id}, {report.added_rows} rows added to the vocabulary")
    table.add_row("time", f"{report.seconds:.1f} s")
    results.print(table)
