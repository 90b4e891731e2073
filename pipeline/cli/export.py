"""`cdp export`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.cli.options import check_and_say_which, output_folder
from storage.regular_files import refuse_unusable

if TYPE_CHECKING:
    from stages.export.gguf_export import GgufReport
    from stages.export.model_card import ExportReport


def export(
    model: Annotated[str, typer.Argument(help="Training run or checkpoint.", metavar="RUN_OR_CHECKPOINT")],
    output: Annotated[Path, typer.Argument(callback=output_folder, help="New folder.", metavar="OUT")],
    fold: Annotated[bool, typer.Option(help="Fold the post-connector into the projector, where exact.")] = True,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option(help="Of the weights; default: as trained, float32 of a training run."),
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="How the model card names the teacher.")] = None,
    file_format: Annotated[
        Literal["huggingface", "gguf"],
        typer.Option("--format", help="A folder for transformers, or GGUF files for llama.cpp."),
    ] = "huggingface",
    evaluation: Annotated[
        list[Path] | None, typer.Option(help="Result of `cdp evaluate`, for the card; may be given several times.")
    ] = None,
) -> None:
    """Writes a student for others. With a model card: a folder that needs transformers only, or GGUF files."""
    from stages.checkpoints.new_folder import check_new
    from stages.evaluation.result import read_result

    check_new(output)
    check_and_say_which(model)
    evaluations = evaluation or []
    for path in evaluations:
        refuse_unusable(path)
        read_result(path)

    from pipeline.export import export as export_folder
    from pipeline.ui.progress import progress_display

    with progress_display() as progress:
        report = export_folder(
            model,
            output,
            fold=fold,
            dtype=dtype,
            teacher=teacher,
            evaluations=evaluations,
            file_format=file_format,
            progress=progress,
        )
    from stages.export.gguf_export import GgufReport

    if isinstance(report, GgufReport):
        _print_gguf(report, output)
    else:
        _print_report(report, output)


def _print_report(report: "ExportReport", folder: Path) -> None:
    from pipeline.ui.tables import print_facts, size_text

    code = f" of {report.custom_code} in it (trust_remote_code=True)" if report.custom_code else " of transformers"
    rounded = ""
    if report.dtype != report.trained_dtype:
        rounded = f" ({report.rounding_error:.2g} by rounding from {report.trained_dtype} alone)"
    facts = [
        ("class", report.model_class + code),
        ("weights", f"{report.parameters:,} parameters, {report.dtype}, {size_text(report.bytes)}"),
        ("post-connector", report.post_connector),
        ("logits", f"{report.logit_error:.2g} off at most{rounded}, the largest is {report.logit_scale:.3g}"),
        ("image token", f"{report.image_token_id}, {report.added_rows} rows added to the vocabulary"),
        ("time", f"{report.seconds:.1f} s"),
    ]
    print_facts(f"export: {folder}", facts)


def _print_gguf(report: "GgufReport", folder: Path) -> None:
    from pipeline.ui.tables import print_facts, size_text

    student, files = report.student, report.files
    facts = [
        ("decoder", files.decoder),
        ("vision tower", files.vision),
        ("weights", f"{student.parameters:,} parameters, {student.dtype}, {size_text(report.bytes)}"),
        ("tokenizer", f"{files.pre_tokenizer}, by llama.cpp's name"),
        ("logits", f"{student.logit_error:.2g} off at most before llama.cpp, the largest is {student.logit_scale:.3g}"),
        ("time", f"{report.seconds:.1f} s"),
    ]
    print_facts(f"export: {folder}", facts)
