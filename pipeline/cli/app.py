"""The `cdp` command: the list of its commands, and how their errors reach the user.

Each command has a file with its flags, its call and its table. Heavy libraries are imported inside the commands, so
that `cdp --help` answers at once.
"""

import re
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pipeline.cli.chat import chat
from pipeline.cli.compare import compare
from pipeline.cli.compare_attention import compare_attention
from pipeline.cli.config import config
from pipeline.cli.convert_checkpoint import convert_checkpoint
from pipeline.cli.demo import demo
from pipeline.cli.estimate import estimate
from pipeline.cli.evaluate import evaluate
from pipeline.cli.export import export
from pipeline.cli.extract_teacher import extract_teacher
from pipeline.cli.inspect import inspect
from pipeline.cli.options import RENAMED
from pipeline.cli.pack_samples import pack_samples
from pipeline.cli.report import report
from pipeline.cli.train_student import train_student
from pipeline.cli.verify import verify
from pipeline.runtime.interruption import Interrupted, raised_on
from pipeline.runtime.waiting_threads import let_waiting_threads_sleep
from pipeline.ui.streams import guard_streams, say
from storage.errors import UserError, disk_errors_named, first_line, path_errors_named
from storage.safe_path import keep_children_safe

COMMANDS = (
    demo,
    pack_samples,
    estimate,
    extract_teacher,
    train_student,
    convert_checkpoint,
    evaluate,
    compare,
    export,
    chat,
    compare_attention,
    report,
    inspect,
    verify,
    config,
)
"""In the order of `cdp --help`; `pack_samples` is typed `pack-samples`."""

_EXTRA_OF = {"pandas": "ray-train", "pyarrow": "ray-train", "obstore": "s3", "sklearn": "digits"}
"""Optional packages and the extra of the project that installs them."""

# Of torch on the CPU, of torch on a GPU, and of Python.
_OUT_OF_MEMORY = re.compile("can't allocate memory|out of memory|can't start new thread")


class _Commands(TyperGroup):
    """All commands; an interruption by Ctrl-C leaves them as `Interrupted`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for word in args:
            if new_name := RENAMED.get(word.partition("=")[0]):
                raise UserError(f"{word.partition('=')[0]} is called {new_name} now")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with raised_on(signal.SIGINT):
            return super().invoke(ctx)


# Plain help: Rich's would load for longer than all the rest of `cdp --help`.
app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
for command in COMMANDS:
    app.command(command.__name__.replace("_", "-"))(command)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"cdp {version('compodistill')}")
        raise typer.Exit


@app.callback()
def cdp(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Offline distillation of multimodal LLMs: run the teacher once, then train any number of students."""


def main() -> None:
    """Runs `cdp`: a user's mistake is one message and exit code 2, an interruption says how to go on."""
    keep_children_safe()
    let_waiting_threads_sleep()
    guard_streams()
    try:
        _check_docstrings()
        with path_errors_named(), disk_errors_named(Path.cwd()):
            app()
    except UserError as error:
        _end(f"error: {error}", 2)
    except ModuleNotFoundError as error:
        extra = _EXTRA_OF.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        _end(f"error: this needs {error.name}, which is not installed; pip install 'compodistill[{extra}]'", 2)
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error))):
            raise
        _end(
            f"error: no memory is left on this machine or its GPU ({first_line(error)}); free some, or lower "
            "train.loader.microbatch_size (training), teacher.batch_size (extraction) or the numbers of processes",
            2,
        )
    except Interrupted as stop:
        _end(str(stop), stop.exit_code)


def _check_docstrings() -> None:
    if sys.flags.optimize > 1:
        raise UserError("transformers reads docstrings, which python -OO removes; set PYTHONOPTIMIZE to 1 or 0")


def _end(message: str, exit_code: int) -> None:
    say(message)
    sys.exit(exit_code)
