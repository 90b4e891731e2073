"""Tables as a terminal and a log show them."""

import pytest

from pipeline.ui.console import results
from pipeline.ui.tables import ReportTable, print_facts, print_table


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
