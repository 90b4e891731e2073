"""`cdp compare`: the folders that are named, and the tables that come of them."""

import json
from pathlib import Path

import pytest

from stages.evaluation.answered_items import item_line, read_items
from stages.evaluation.result import make_result
from stages.evaluation.suites.suite import Item, Question
from tests.pipeline.processes import run_here
from tests.stages.evaluation.test_comparison import save_result
from tests.suite_runs import suite_run


def test_runs_stand_side_by_side_with_their_differences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_result(tmp_path / "base/sugarcrepe", [1.0, 0.0, 0.0, 0.0])
    save_result(tmp_path / "tuned/sugarcrepe", [1.0, 1.0, 1.0, 0.0])
    save_result(tmp_path / "tuned-blind/sugarcrepe", [0.0, 1.0, 0.0, 0.0], blind=True)
    folders = [tmp_path / name for name in ("base", "tuned", "tuned-blind")]
    saved = ("--report", tmp_path / "report.json", "--markdown", tmp_path / "table.md")
    done = run_here("compare", *folders, *saved, monkeypatch=monkeypatch, capsys=capsys)
    assert done.code == 0, done.err
    # A narrow terminal wraps the cells.
    for text in ("differences to base", "tuned", "(grey)", "+50.0"):
        assert text in done.out
    (compared,) = json.loads((tmp_path / "report.json").read_text())
    assert list(compared["results"]) == ["base", "tuned", "tuned-blind (grey)"]
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[2].startswith("|  | base | tuned | tuned-blind (grey) | tuned - base |")
    assert lines[4].startswith("| swap_obj: accuracy | 25.0 [")
    assert lines[4].endswith("| McNemar, 4 items |")


def test_suites_of_one_run_alone_are_named_and_the_others_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("all/sugarcrepe", "blind/sugarcrepe"):
        save_result(tmp_path / folder, [1.0, 0.0])
    for run, suite in (("all", "aro"), ("blind", "sade")):
        result = (save_result(tmp_path / run / suite, [1.0]) / "result.json").read_text()
        (tmp_path / run / suite / "result.json").write_text(result.replace('"sugarcrepe"', f'"{suite}"'))
    saved = ("--report", tmp_path / "report.json", "--markdown", tmp_path / "table.md")
    words = (tmp_path / "all", tmp_path / "blind", *saved)
    done = run_here("compare", *words, monkeypatch=monkeypatch, capsys=capsys)
    assert done.code == 0, done.err
    said = "only one result of aro (all), sade (blind): not compared"
    assert f"note: {said}" in " ".join(done.out.split())
    assert (tmp_path / "table.md").read_text().endswith(f"\n\n{said}\n")
    (compared,) = json.loads((tmp_path / "report.json").read_text())
    assert (compared["suite"], list(compared["results"])) == ("sugarcrepe", ["all", "blind"])


def test_a_suite_whose_labels_a_server_has_stands_there_without_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        save_result(tmp_path / name / "sugarcrepe", [1.0, 0.0])
        folder = tmp_path / name / "vqav2-test-dev"
        folder.mkdir()
        item = Item("1", ("all",), (Question("?", ()),), None)
        (folder / "items.jsonl").write_text(item_line(item, ["red"], {}, [[]]) + "\n")
        run = suite_run(suite="vqav2-test-dev", protocol="generate")
        (folder / "result.json").write_text(make_result(run, read_items(folder).values(), [], 100, 1.0, 1).to_json())
    saved = ("--markdown", tmp_path / "table.md")
    done = run_here("compare", tmp_path / "a", tmp_path / "b", *saved, monkeypatch=monkeypatch, capsys=capsys)
    assert done.code == 0, done.err
    text = (tmp_path / "table.md").read_text()
    assert "| no metric: its makers have the labels |" in text
    assert "| swap_obj: accuracy | 50.0 [0.0, 100.0] |" in text


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("a",), "only one result of sugarcrepe"),
        (("a", "nowhere"), "nowhere holds no result"),
        (("a", "a/sugarcrepe/items.jsonl"), "holds no result"),
    ],
)
def test_what_cannot_be_compared_is_said(
    folders: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_result(tmp_path / "a/sugarcrepe", [1.0, 0.0])
    done = run_here("compare", *(tmp_path / name for name in folders), monkeypatch=monkeypatch, capsys=capsys)
    assert (done.code, message in done.err) == (2, True)
