"""`cdp evaluate`."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import ConfigOption, ReportOption, SetOption, save, say_which_student

if TYPE_CHECKING:
    from stages.evaluation.report import EvaluationReport


class Scoring(StrEnum):
    """Values of `--scoring`."""

    LIKELIHOOD = "likelihood"
    LETTERS = "letters"


def evaluate(
    model: Annotated[str, typer.Argument(help="Checkpoint: a folder, a training run, or a hub id.")],
    pairs: Annotated[Path, typer.Option(help="Folder of KIND.json files in SugarCrepe's layout.")],
    images: Annotated[Path | None, typer.Option(help="Folder of the pairs' images; default: PAIRS/images.")] = None,
    scoring: Annotated[Scoring | None, typer.Option(help="By likelihood, or by the letter answered.")] = None,
    limit: Annotated[int | None, typer.Option(help="Pairs of each kind.", min=1)] = None,
    report: ReportOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Scores a model on compositional suites. Gives the accuracy of each kind with its 95 % interval."""
    from pipeline.evaluation import evaluate_checkpoint
    from pipeline.run_file import load_run_file
    from pipeline.ui.progress import progress_display

    run = load_run_file(config, settings or [], {"evaluate.scoring": scoring.value if scoring else None})
    say_which_student(model)
    with progress_display() as progress:
        result = evaluate_checkpoint(model, pairs, images, run.evaluate, limit, progress)
    if report is not None:
        save(report, result.model_dump_json(indent=1))
    _print_report(Path(model).name, result)


def _print_report(model: str, report: "EvaluationReport") -> None:
    """Prints accuracy in percent and its interval."""
    from rich.markup import escape
    from rich.table import Table

    from pipeline.ui.console import results

    table = Table(title=f"accuracy in percent ({report.scoring}, 95 % interval)")
    table.add_column("kind")
    table.add_column("pairs", justify="right")
    table.add_column(escape(model), justify="right")
    for name, kind in report.kinds.items():
        low, high = kind.interval_95
        accuracy = f"{100 * kind.accuracy:.1f} [{100 * low:.0f}, {100 * high:.0f}]"
        table.add_row(name, str(kind.num_pairs), accuracy)
    table.add_section()
    table.add_row("average", str(report.num_pairs), f"{100 * report.average:.1f}", style="bold")
    results.print(table)
