"""`cdp convert-checkpoint`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import output_folder

if TYPE_CHECKING:
    from stages.convert.checkpoint import ConversionReport


def convert_checkpoint(
    source: Annotated[str, typer.Argument(help="Released checkpoint: folder or hub id.", metavar="SRC")],
    output: Annotated[Path, typer.Argument(callback=output_folder, help="New folder.", metavar="OUT")],
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer, if SRC has none: folder or hub id.")] = None,
    image_processor: Annotated[
        str | None, typer.Option(help="Image processor, if SRC has none: folder or hub id.")
    ] = None,
) -> None:
    """Converts a released checkpoint to Llava. Takes CompoDistill's or TinyLLaVA's; adds processor and template."""
    from stages.checkpoints.new_folder import check_new
    from stages.checkpoints.resolve import local_folder, resolve_checkpoint
    from stages.convert.released_config import read_released_config

    check_new(output)
    read_released_config(resolve_checkpoint(source, with_weights=Path(source).is_dir()))
    for named in filter(None, (tokenizer, image_processor)):
        local_folder(named)

    from pipeline.ui.progress import progress_display
    from stages.convert.checkpoint import convert_checkpoint as convert

    with progress_display() as progress:
        report = convert(source, output, tokenizer=tokenizer, image_processor=image_processor, progress=progress)
    _print_report(report, output)


def _print_report(report: "ConversionReport", folder: Path) -> None:
    from pipeline.ui.tables import print_facts, size_text

    named = report.tokenizer_named or "FOLDER_OR_HUB_ID"
    missing = f"none found, so no processor was written; convert again into a new folder with --tokenizer {named}"
    facts = [
        ("type", f"{report.layout} -> {report.model_type}, {report.dtype}"),
        ("weights", f"{report.tensors:,} tensors, {size_text(report.bytes)}"),
        ("image token", f"{report.image_token_id}, {report.added_rows} rows added to the vocabulary for it"),
        ("tokenizer", report.tokenizer_from or missing),
        ("image processor", report.image_processor_from),
        ("time", f"{report.seconds:.1f} s"),
    ]
    print_facts(f"checkpoint: {folder}", facts)
