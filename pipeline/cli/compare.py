"""`cdp compare`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import ReportOption, can_be_saved, input_path, save
from storage.errors import UserError

if TYPE_CHECKING:
    from pipeline.ui.tables import ReportTable
    from stages.evaluation.comparison import ComparedMetric, SuiteComparison


def compare(
    results: Annotated[
        list[Path], typer.Argument(help="Folders of `cdp evaluate`; the others are compared with the first.")
    ],
    report: ReportOption = None,
    markdown: Annotated[
        Path | None, typer.Option(callback=can_be_saved, help="File to save the tables in, as Markdown.")
    ] = None,
) -> None:
    """Compares results of the same suites. Gives metrics with intervals, and differences with a paired test."""
    from pipeline.ui.tables import markdown_table, print_notes, print_table
    from stages.evaluation.comparison import compare_results

    for path in results:
        input_path(path)
    shared, left = _by_suite(results)
    compared = [compare_results(folders) for folders in shared.values()]
    tables = [comparison_table(one) for one in compared]
    for table in tables:
        print_table(table)
    print_notes(left)
    save(report, json.dumps([one.model_dump(mode="json") for one in compared], indent=1))
    save(markdown, "\n\n".join([*map(markdown_table, tables), *left]) + "\n")


def _by_suite(paths: list[Path]) -> tuple[dict[str, dict[str, Path]], list[str]]:
    """Folders of results by suite and then by name.

    Also what is to be said of suites with one result alone, which are left out.
    """
    from stages.evaluation.result import SuiteResult, read_result
    from stages.evaluation.result_folders import result_names, results_below

    by_suite: dict[str, dict[Path, SuiteResult]] = {}
    for folder in (folder for path in paths for folder in results_below(path)):
        result = read_result(folder)
        by_suite.setdefault(result.run.suite, {})[folder] = result
    found = {
        suite: {
            name + (" (grey)" if result.run.blind else ""): folder
            for name, (folder, result) in zip(result_names(list(of_suite)), of_suite.items(), strict=True)
        }
        for suite, of_suite in by_suite.items()
    }
    shared = {suite: named for suite, named in found.items() if len(named) > 1}
    alone = [f"{suite} ({next(iter(found[suite]))})" for suite in found if suite not in shared]
    said = f"only one result of {', '.join(alone)}"
    if not shared:
        raise UserError(f"{said}; name results of the same suite from two runs at least")
    return shared, [f"{said}: not compared"] if alone else []


def comparison_table(compared: "SuiteComparison") -> "ReportTable":
    """Makes a line for each metric of each kind; values with intervals, then differences to the first result."""
    from pipeline.ui.tables import ReportTable

    first, *others = compared.results
    rows = [
        [f"{kind}: {name}", *_cells(metric), _tests(metric)]
        for kind, of_kind in compared.metrics.items()
        for name, metric in of_kind.items()
    ]
    title = f"{compared.suite} ({compared.protocol}), 95 % intervals; differences to {first} on the same items"
    header = ["", *compared.results, *(f"{name} - {first}" for name in others), "p by"]
    # Only the makers' server has the labels of some suites.
    return ReportTable(title, header, rows or [["no metric: its makers have the labels", *[""] * (len(header) - 1)]])


def _tests(metric: "ComparedMetric") -> str:
    """What the p-values are by, and over how many items or images."""
    names = {"mcnemar": "McNemar", "bootstrap": "bootstrap"}
    found = (f"{names[one.test]}, {one.num_units:,} {one.units}" for one in metric.differences.values())
    return "; ".join(dict.fromkeys(found))


def _cells(metric: "ComparedMetric") -> list[str]:
    cells = [f"{one.value:.1f} [{one.interval_95[0]:.1f}, {one.interval_95[1]:.1f}]" for one in metric.values.values()]
    for one in metric.differences.values():
        low, high = one.interval_95
        cells.append(f"{one.value:+.1f} [{low:+.1f}, {high:+.1f}], p={one.p_value:.2g}")
    return cells
