"""`cdp evaluate`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.options import (
    ConfigOption,
    ReportOption,
    SetOption,
    check_and_say_which,
    input_path,
    output_folder,
    save,
)
from storage.errors import UserError

if TYPE_CHECKING:
    from pipeline.run_file import RunFile
    from pipeline.ui.tables import ReportTable
    from stages.evaluation.config import SuiteConfig
    from stages.evaluation.result import SuiteResult

ALL = "all"


def evaluate(
    model: Annotated[str, typer.Argument(help="Checkpoint: a folder, a training run, or a hub id.")],
    suite: Annotated[str, typer.Option(help="Name of a suite; all: those of the run file's `evaluate.suites`.")],
    output: Annotated[Path, typer.Option(callback=output_folder, help="Folder of the answers and results.")],
    data: Annotated[Path | None, typer.Option(callback=input_path, help="Folder of the suite's files.")] = None,
    images: Annotated[
        Path | None, typer.Option(callback=input_path, help="Folder of its images, if they lie elsewhere.")
    ] = None,
    protocol: Annotated[str | None, typer.Option(help="How it is asked; default: its makers' way.")] = None,
    blind: Annotated[bool, typer.Option("--blind", help="Show a grey picture in place of each.")] = False,
    limit: Annotated[int | None, typer.Option(help="Items of each kind.", min=1)] = None,
    allow_missing_images: Annotated[
        bool, typer.Option("--allow-missing-images", help="Count items without their images as missing.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Answer in so many workers of a Ray cluster; default: in this process.")
    ] = None,
    report: ReportOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Asks a model suites by their makers' rules. Gives their metrics with 95 % intervals; goes on after a kill."""
    from pipeline.run_file import load_run_file

    run = load_run_file(config, settings or [], {"evaluate.num_workers": workers})
    flags = {
        "data": data,
        "images": images,
        "protocol": protocol,
        "blind": blind or None,
        "limit": limit,
        "allow_missing_images": allow_missing_images or None,
    }
    suites = _suites(suite, run, {name: value for name, value in flags.items() if value is not None})
    check_and_say_which(model)

    from stages.evaluation.loaded_suite import load_suite

    loaded = {name: load_suite(name, suite_config) for name, suite_config in suites.items()}

    from pipeline.suite_evaluation import evaluate_suites
    from pipeline.ui.progress import progress_display
    from pipeline.ui.tables import print_table_above_bars

    def show(result: "SuiteResult") -> None:
        print_table_above_bars(result_table(result, Path(model).name))

    with progress_display() as progress:
        for note in (note for one in loaded.values() for note in one.notes):
            progress.message(f"note: {note}")
        results = evaluate_suites(model, loaded, run.evaluate, output, progress, run.images, finished=show)
    save(report, json.dumps({name: result.model_dump(mode="json") for name, result in results.items()}, indent=1))


def _suites(wanted: str, run: "RunFile", flags: dict[str, Any]) -> dict[str, "SuiteConfig"]:
    """What is asked: the suite of the flags, or all of the run file with the flags over each."""
    from stages.evaluation.config import SuiteConfig
    from stages.evaluation.suites.registry import find_suite
    from stages.settings import validated

    told = run.evaluate.suites
    names = [wanted]
    if wanted == ALL:
        if not told:
            raise UserError("--suite all asks the suites of the run file; set evaluate.suites in it and give --config")
        names = list(told)
    found = {}
    for name in names:
        settings = (told[name].model_dump(mode="json") if name in told else {}) | flags
        suite, _ = find_suite(name, None)
        if "data" not in settings:
            raise UserError(f"--suite {name} needs --data, its folder; fetch {suite.fetch}")
        found[name] = validated(SuiteConfig, settings, f"suite {name}")
    return found


def result_table(result: "SuiteResult", model: str) -> "ReportTable":
    """Makes a line for each kind and a column for each metric; intervals behind the values."""
    from pipeline.ui.tables import ReportTable

    names = list(dict.fromkeys(name for of_kind in result.metrics.values() for name in of_kind))
    rows = []
    for kind, metrics in result.metrics.items():
        cells = []
        for name in names:
            if (metric := metrics.get(name)) is None:
                cells.append("")
            else:
                low, high = metric.interval_95
                cells.append(f"{metric.value:.1f} [{low:.1f}, {high:.1f}]")
        rows.append([kind, str(result.num_items.get(kind, "")), *cells, *_missing(result, kind)])
    unasked = [kind for kind in result.num_missing_of if kind not in result.metrics]
    rows += [[kind, "0", *[""] * len(names), *_missing(result, kind)] for kind in unasked]
    if any(chance := [_chance(result, name) for name in names]):
        rows.append(["guessing", "", *chance, *[""] * bool(result.num_missing)])
    blind = ", grey pictures" if result.run.blind else ""
    missing = f", {result.num_missing} items without their images left out" if result.num_missing else ""
    title = f"{model} on {result.run.suite} ({result.run.protocol}{blind}; 95 % intervals{missing})"
    return ReportTable(title, ["kind", "items", *names, *["without images"] * bool(result.num_missing)], rows)


def _missing(result: "SuiteResult", kind: str) -> list[str]:
    """A cell, where items of any kind lack their images."""
    return [str(result.num_missing_of.get(kind, 0))] if result.num_missing else []


def _chance(result: "SuiteResult", name: str) -> str:
    """What guessing gets in a metric; from the least to the most where kinds differ."""
    found = (one[name].chance for one in result.metrics.values() if name in one)
    of_kinds = sorted({chance for chance in found if chance is not None})
    return " to ".join(f"{chance:.1f}" for chance in dict.fromkeys([*of_kinds[:1], *of_kinds[-1:]]))
