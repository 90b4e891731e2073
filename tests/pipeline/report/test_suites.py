"""Results of suites on a page, and what models answered about a picture."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.report.page import TEACHER, Bar
from pipeline.report.suites import named_results, questions_about, suite_sections
from stages.evaluation.result import Metric, SuiteResult
from storage.errors import UserError
from tests.suite_runs import suite_run


def make_result(folder: Path, value: float, answered: list[dict[str, Any]] | None = None, **run: Any) -> Path:
    """A suite's folder with one number, and these items."""
    folder.mkdir(parents=True)
    result = SuiteResult(
        run=suite_run(**run),
        metrics={
            kind: {"accuracy": Metric(value=value, interval_95=(value - 5, value + 5), chance=50.0)}
            for kind in ("swap_obj", "average")
        },
        num_items={"swap_obj": 1200},
        num_missing=run.get("blind", False) * 3,
        seconds=1,
        items_per_s=1,
    )
    (folder / "result.json").write_text(result.to_json())
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in answered or []))
    return folder


def item(picture: Path, answers: list[Any], counts: dict[str, float], **other: Any) -> dict[str, Any]:
    digest = hashlib.sha256(picture.read_bytes()).hexdigest()
    question = {"prompt": "Is it red?", "pictures": [str(picture)], "sha256": [digest]} | other.pop("question", {})
    shown = {"id": "0", "kinds": ["swap_obj"], "unit": "0", "questions": [question], "expected": "yes"}
    return shown | {"answers": answers, "counts": counts} | other


def test_models_stand_side_by_side_the_teacher_first_and_runs_under_their_names(tmp_path: Path) -> None:
    make_result(tmp_path / "run" / "suites" / "sugarcrepe", 70, weights="of run")
    found = named_results(
        [
            make_result(tmp_path / "results" / "other" / "sugarcrepe", 60, weights="of nobody"),
            make_result(tmp_path / "results" / "again" / "sugarcrepe", 75, weights="of second").parent,
        ],
        [make_result(tmp_path / "t" / "sugarcrepe", 90, weights="of teacher").parent],
        {"run": (tmp_path / "run", "of run"), "second": (tmp_path / "second", "of second")},
    )
    (section,) = suite_sections(found)
    assert section.title == "sugarcrepe (likelihood)"
    assert section.main is not None
    assert section.main.bars[0] == Bar(TEACHER, 90, 85, 95)
    assert [(bar.model, bar.value) for bar in section.main.bars[1:]] == [("run", 70), ("other", 60), ("second", 75)]
    assert section.main.chance == 50
    assert [group.title for group in section.by_kind] == ["swap_obj: accuracy", "average: accuracy"]
    assert section.notes == ("1,200 items",)


def test_an_item_of_several_kinds_is_one_item(tmp_path: Path) -> None:
    for blind, note in ((False, "900 items"), (True, "897 items")):
        folder = make_result(tmp_path / str(blind) / "suites" / "sugarcrepe", 70, num_items=900, blind=blind)
        (section,) = suite_sections(named_results([folder], [], {}))
        assert section.notes[0] == note


def test_other_protocols_and_other_items_are_sections_of_their_own(tmp_path: Path) -> None:
    runs: list[dict[str, Any]] = [{}, {"protocol": "mean_likelihood"}, {"items": "e"}]
    folders = [make_result(tmp_path / str(n) / "s", 60, **run) for n, run in enumerate(runs)]
    titles = [section.title for section in suite_sections(named_results(folders, [], {}))]
    assert titles == [
        "sugarcrepe (likelihood), items d",
        "sugarcrepe (mean_likelihood)",
        "sugarcrepe (likelihood), items e",
    ]


def test_grey_pictures_are_said_with_the_model_and_missing_ones_below(tmp_path: Path) -> None:
    (section,) = suite_sections(named_results([make_result(tmp_path / "a" / "s", 55, blind=True)], [], {}))
    assert section.by_kind[0].bars[0].model == "a (grey pictures)"
    assert section.notes == ("1,200 items", "3 items without their pictures were not asked")


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no result of `cdp evaluate`: .* is there; name its --output"):
        named_results([tmp_path], [], {})


def test_a_suites_item_about_a_samples_picture_is_shown_with_all_answers(tmp_path: Path) -> None:
    (tmp_path / "same.png").write_bytes(b"picture")
    (tmp_path / "other.png").write_bytes(b"another")
    same = tmp_path / "same.png"
    found = named_results(
        [
            make_result(tmp_path / "a" / "s", 1, [item(same, ["Yes."], {"accuracy": 1.0})], items="1"),
            make_result(tmp_path / "b" / "s", 1, [item(same, ["No."], {"accuracy": 0.0})], items="1"),
            make_result(tmp_path / "c" / "s", 1, [item(tmp_path / "other.png", ["No."], {})], items="1"),
            make_result(tmp_path / "d" / "s", 1, [item(same, ["No."], {}, question={"sha256": []})], items="1"),
        ],
        [],
        {},
    )
    nothing, (one,) = questions_about([b"unknown", b"picture"], found)
    assert nothing == ()
    assert (one.suite, one.question, one.expected) == ("sugarcrepe (likelihood)", "Is it red?", "yes")
    assert one.answers == (("a", "Yes.", True), ("b", "No.", False))


def test_of_captions_the_likeliest_is_the_answer_and_no_single_count_is_neither_right_nor_wrong(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(b"picture")
    captions = {"candidates": ["red left of blue", "blue left of red"]}
    asked = item(tmp_path / "p.png", [[[-3.0, 4, -1.0], [-2.0, 4, -1.0]]], {"i2t": 1.0, "t2i": 0.0}, question=captions)
    found = named_results([make_result(tmp_path / "a" / "s", 1, [asked | {"expected": None}])], [], {})
    ((one,),) = questions_about([b"picture"], found)
    assert one.expected == ""
    assert one.answers == (("a", "blue left of red", None),)


def test_results_of_a_run_that_is_not_on_the_page_have_the_runs_name(tmp_path: Path) -> None:
    make_result(tmp_path / "baseline" / "suites" / "sugarcrepe", 60, weights="of nobody")
    (found,) = named_results([tmp_path / "baseline"], [], {})
    assert found.model == "baseline"
