"""Items of suites are linked to samples by the bytes of their pictures, and split by right and wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.evaluation.attention.answers import how_right, split_by_answers
from stages.evaluation.attention.suite_folders import read_run, suite_folders
from storage.errors import UserError
from tests.suite_runs import suite_run


def line(number: int, digests: list[str], accuracy: float) -> dict[str, Any]:
    questions = [{"prompt": "?", "pictures": ["p"], "sha256": [digest]} for digest in digests]
    rest = {"kinds": ["a"], "unit": str(number), "answers": ["A"] * len(questions)}
    return {"id": str(number), "questions": questions, "counts": {"accuracy": accuracy}, **rest}


def folder_of(folder: Path, lines: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "run.json").write_text(suite_run().to_json())
    (folder / "items.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in lines))
    return folder


def test_similarity_is_split_and_correlated_by_hand(tmp_path: Path) -> None:
    lines = [line(0, ["a", "a"], 1), line(1, ["a"], 0), line(2, ["b"], 1), line(3, ["c"], 0)]
    lines += [line(4, ["absent"], 1), line(5, ["a", "b"], 1)]
    similarities = {"a": [(0.2, 0.4), (0.4, 0.6)], "b": [(0.9, 0.7)], "c": [(0.1, 0.1)]}
    found = split_by_answers(folder_of(tmp_path / "s", lines), suite_run(), similarities)
    assert (found.num_items, found.num_without_sample, found.num_other) == (4, 1, 1)
    assert (found.suite, found.protocol) == ("sugarcrepe", "likelihood")
    assert found.right is not None
    assert found.wrong is not None
    # Pictures: a .4, b .8, c .1; right: a and b, wrong: a and c.
    assert found.right.value == pytest.approx(0.6)
    assert found.wrong.value == pytest.approx(0.25)
    assert found.correlation is not None
    # x = .4 .4 .8 .1 has mean .425 and squared deviations of .24750 in sum; with y it has .35.
    assert found.correlation.value == pytest.approx(0.35 / (0.2475**0.5 * 1.0))
    assert found.correlation.num_images == 3
    assert len(found.by_layer) == 2


def test_where_no_picture_is_a_samples_nothing_is_correlated_and_all_are_counted(tmp_path: Path) -> None:
    found = split_by_answers(folder_of(tmp_path / "s", [line(0, ["a"], 1)]), suite_run(), {"b": [(0.5,)]})
    assert (found.num_items, found.num_without_sample) == (0, 1)
    assert (found.right, found.wrong, found.correlation, found.by_layer) == (None, None, None, ())


def test_whether_an_item_is_right_is_its_suites_own_count() -> None:
    assert how_right({"accuracy": 0.3}, "vqav2") == 0.3
    table = {"true_positives": 0, "false_positives": 0, "true_negatives": 1, "false_negatives": 0}
    assert how_right(table, "pope") == 1
    assert how_right(table | {"true_negatives": 0, "false_negatives": 1}, "pope") == 0
    with pytest.raises(UserError, match="does not say whether one is right"):
        how_right({"other": 1}, "pope")


def test_answers_of_an_earlier_version_and_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    old = line(0, ["a"], 1)
    del old["questions"][0]["sha256"]
    with pytest.raises(UserError, match=r"line 1: expected sha256 of type list.*evaluate` again"):
        split_by_answers(folder_of(tmp_path / "s", [old]), suite_run(), {})
    with pytest.raises(UserError, match="holds no answers"):
        suite_folders(tmp_path / "none")
    (tmp_path / "s" / "run.json").write_text("{}")
    with pytest.raises(UserError, match="evaluate again"):
        read_run(tmp_path / "s")


def test_answers_to_grey_pictures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(suite_run(blind=True).to_json())
    with pytest.raises(UserError, match="holds answers to grey pictures; give those"):
        read_run(tmp_path)


def test_the_folders_of_all_suites_of_an_output_are_found(tmp_path: Path) -> None:
    folder_of(tmp_path / "sugarcrepe", [])
    assert suite_folders(tmp_path) == [tmp_path / "sugarcrepe"] == suite_folders(tmp_path / "sugarcrepe")
