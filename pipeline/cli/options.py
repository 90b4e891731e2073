"""Options that several commands take, and what they do."""

from contextlib import suppress
from pathlib import Path
from stat import S_ISDIR
from typing import Annotated

import typer

from pipeline.recipes import recipe_names
from storage.errors import UserError, disk_errors_named
from storage.regular_files import is_regular, refuse_unusable
from storage.writable import check_writable


def input_path(path: Path | None) -> Path | None:
    """A file or folder to read, as the command line has it.

    Raises:
        UserError: If it is a URL, or cannot be a path here.
    """
    if path is not None:
        refuse_unusable(path)
    return path


def output_folder(folder: Path) -> Path:
    """A folder to write, as the command line has it; refused before the work is done whose result it is for.

    Raises:
        UserError: If it cannot be made or written, or is a URL.
    """
    check_writable(folder)
    return folder


def can_be_saved(path: Path | None) -> Path | None:
    """A file to save a report in, as the command line has it; refused before the work is done that it reports.

    Raises:
        UserError: If it is a folder, lies below a file, or nothing can be written there.
    """
    if path is None:
        return None
    if above := next((each for each in path.parents if is_regular(each)), None):
        raise UserError(f"{path} leads through {above}, which is a file; name a file in a folder")
    with suppress(FileNotFoundError):
        if S_ISDIR(path.stat().st_mode):
            raise UserError(f"{path} is a folder, expected a file to save a report in; name a file")
    # A device is not made anew: what it takes, it says itself.
    if path.is_file() or not path.exists():
        check_writable(path.parent)
    return path


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=input_path,
        help=f"Run file (YAML) with any setting, or a recipe: {', '.join(recipe_names())}.",
    ),
]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="section.field=value; wins over the run file.")]
TeacherOption = Annotated[str | None, typer.Option("--teacher", help="Teacher checkpoint: folder or hub id.")]
SamplesOption = Annotated[str | None, typer.Option("--samples", help="Sample shards: folder or object-store URL.")]
TargetsOption = Annotated[str | None, typer.Option("--targets", help="Target store: folder or object-store URL.")]
TargetsArgument = Annotated[str, typer.Argument(help="Target store: folder or object-store URL.")]
TeachersOption = Annotated[
    int | None, typer.Option("--workers", help="Teachers that run side by side; default: one a GPU, or one a core.")
]
ReportOption = Annotated[
    Path | None, typer.Option("--report", callback=can_be_saved, help="File to save the report in, as JSON.")
]

RENAMED = {
    "--adapter": "--vision",
    "--json": "--report",
    "--page": "--html",
    "--pairs": "--data, with --suite sugarcrepe,",
    "--scoring": "--protocol",
}
"""Options of earlier versions -> what they are called now."""


def save(path: Path | None, text: str) -> None:
    """Writes a report into a folder that need not exist, if a file for it was named: whole, or not at all.

    Print the results first: they are not lost then if the disk is full by now. A device or FIFO that was named is
    written to, not replaced.
    """
    from storage.stores import open_store

    if path is None:
        return
    path = path.resolve()
    if path.exists() and not path.is_file():
        with disk_errors_named(path):
            path.write_text(text, encoding="utf-8")
    else:
        open_store(path.parent).write(path.name, text.encode())


def check_and_say_which(model: str, *, with_template: bool = True) -> None:
    """Refuses what is no model, or has no chat template though one is needed.

    Says which of a training run's students a command uses; of several processes the first says it.
    """
    from pipeline.preflight import check_model
    from pipeline.ui.console import is_main_process
    from pipeline.ui.streams import say

    for note in check_model(model, with_template=with_template):
        if is_main_process:
            say(note)
