"""Tables as a terminal and a log show them."""

import io

import pytest

from pipeline.ui import progress, tables
from pipeline.ui.console import PlainConsole, results
from pipeline.ui.progress import progress_display
from pipeline.ui.tables import ReportTable, print_facts, print_table, print_table_above_bars


def test_a_table_in_a_log_is_as_wide_as_its_content(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    long = " ".join(["word"] * 60)
    print_facts("facts", [("name", long)])
    print_table(ReportTable("numbers", ["name", "value"], [["a", long]]))
    results.print(long)
    shown = capsys.readouterr().out.splitlines()
    assert sum(long in line for line in shown) == 3
    assert max(map(len, shown)) < len(long) + 20


def test_whoever_sets_the_columns_of_a_log_gets_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "_environ", {"COLUMNS": "40"})
    monkeypatch.setattr(results, "_width", None)  # of a COLUMNS that was there when the console was made
    monkeypatch.setenv("COLUMNS", "40")
    print_facts("facts", [("name", "word " * 60)])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 40


@pytest.mark.parametrize(("out", "err"), [(True, True), (False, True), (True, False)])
def test_a_table_beside_bars_goes_to_standard_output_and_is_whole(
    out: bool, err: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal, file, log = io.StringIO(), io.StringIO(), io.StringIO()
    shown = {
        "results": PlainConsole(file=terminal if out else file, force_terminal=out, width=80),
        "messages": PlainConsole(file=terminal if err else log, force_terminal=err, width=80, no_color=True),
    }
    monkeypatch.setenv("TERM", "xterm")
    for name, console in shown.items():
        monkeypatch.setattr(tables, name, console)
    monkeypatch.setattr(progress, "messages", shown["messages"])
    with progress_display() as bars:
        bars.task("first", 2).advance(2)
        print_table_above_bars(ReportTable("numbers", ["name", "value"], [["a", "1.0"]]))
        bars.task("second", 2).advance(1)
    table = (terminal if out else file).getvalue()
    assert table.count("numbers") == 1
    # No bar stands between the table's lines.
    assert "first" not in table[table.index("numbers") : table.index("└")]
    assert "numbers" not in log.getvalue()
