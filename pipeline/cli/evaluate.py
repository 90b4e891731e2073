"""`cdp evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.cli.options import ConfigOption, ReportOption, SetOption, check_and_say_which, input_path, save

if TYPE_CHECKING:
    from stages.evaluation.report import EvaluationReport


def evaluate(
    model: Annotated[str, typer.Argument(help="Checkpoint: a folder, a training run, or a hub id.")],
    pairs: Annotated[Path, typer.Option(callback=input_path, help="Folder of KIND.json files in SugarCrepe's layout.")],
    images: Annotated[
        Path | None, typer.Option(callback=input_path, help="Folder of the pairs' images; default: PAIRS/images.")
    ] = None,
    scoring: Annotated[
        Literal["likelihood", "letters"] | None, typer.Option(help="By likelihood, or by the letter answered.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Pairs of each kind.", min=1)] = None,
    report: ReportOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Scores a model on compositional suites. Gives the accuracy of each kind with its 95 % interval."""
    from pipeline.run_file import load_run_file
    from stages.evaluation.caption_pairs import load_pairs

    run = load_run_file(config, settings or [], {"evaluate.scoring": scoring})
    check_and_say_which(model)
    load_pairs(pairs, images, limit=limit)

    from pipeline.evaluation import evaluate_checkpoint
    from pipeline.ui.progress import progress_display

    with progress_display() as progress:
        result = evaluate_checkpoint(model, pairs, images, run.evaluate, limit, progress, run.images)
    _print_report(Path(model).name, result)
    save(report, result.to_json())


def _print_report(model: str, report: "EvaluationReport") -> None:
    """Prints accuracy in percent and its interval."""
    from pipeline.ui.tables import ReportTable, print_table

    rows = []
    for name, kind in report.kinds.items():
        low, high = (f"{100 * end:.0f}" for end in kind.interval_95)
        rows.append([name, str(kind.num_pairs), f"{100 * kind.accuracy:.1f} [{low}, {high}]"])
    rows.append(["average", str(report.num_pairs), f"{100 * report.average:.1f}"])
    title = f"accuracy in percent ({report.scoring}, 95 % interval)"
    print_table(ReportTable(title, ["kind", "pairs", model], rows))
