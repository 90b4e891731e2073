from pathlib import Path
from typing import Any

import pyarrow
import pytest

from storage.errors import UserError
from tests.stages.evaluation.suites.scorer import answer_of, draw, load, values, write_parquet
from tests.stages.samples.saved_rows import save_rows

SCORES = {"good": -1.0, "bad": -2.0}
"""Whatever the picture: of each row the first text comparison is right, and no other."""


def row(image: bytes, negative: bytes, kind: str = "replace", subtype: str = "obj") -> dict[str, Any]:
    return {
        "image": {"bytes": image, "path": "a.jpg"},
        "caption": "good",
        "negative_caption": "bad",
        "negative_image": {"bytes": negative, "path": None},
        "type": kind,
        "subtype": subtype,
    }


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    red, blue, green = (draw(tmp_path / f"{color}.png", color).read_bytes() for color in ("red", "blue", "green"))
    return [row(red, blue), row(red, green), row(green, blue, "swap", "att")]


@pytest.fixture
def folder(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    write_parquet(tmp_path / "hub" / "data" / "test-00000-of-00002.parquet", rows[:2])
    write_parquet(tmp_path / "hub" / "data" / "test-00001-of-00002.parquet", rows[2:])
    return tmp_path / "hub"


def test_scores_are_of_all_rows_and_of_each_type_and_subtype(folder: Path) -> None:
    found = values(load("bivlc", folder), SCORES)
    assert list(found) == ["replace_obj", "replace", "all", "swap_att", "swap"]
    for scores in found.values():
        assert scores == {
            "I2T": 0.0,
            "Ipos2T": 100.0,
            "Ineg2T": 0.0,
            "T2I": 0.0,
            "group": 0.0,
            "Tpos2I": 0.0,
            "Tneg2I": 0.0,
        }


def test_every_caption_is_asked_of_both_pictures_of_its_row(folder: Path, rows: list[dict[str, Any]]) -> None:
    item = load("bivlc", folder).items[1]
    assert [(question.prompt.split('"')[1], question.pictures[0].source.read()) for question in item.questions] == [
        ("good", rows[1]["image"]["bytes"]),
        ("bad", rows[1]["image"]["bytes"]),
        ("good", rows[1]["negative_image"]["bytes"]),
        ("bad", rows[1]["negative_image"]["bytes"]),
    ]


def test_rows_about_one_picture_are_drawn_together(folder: Path) -> None:
    units = [item.unit for item in load("bivlc", folder).items]
    assert units[0] == units[1] != units[2]


def test_a_saved_data_set_is_read_alike(folder: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    saved = load("bivlc", save_rows(pyarrow.Table.from_pylist(rows), tmp_path / "saved"), protocol="likelihood")
    hub = load("bivlc", folder, protocol="likelihood")
    for ours, theirs in zip(saved.items, hub.items, strict=True):
        assert (ours.id, ours.kinds) == (theirs.id, theirs.kinds)
        assert [answer_of(question, SCORES) for question in ours.questions] == [
            answer_of(question, SCORES) for question in theirs.questions
        ]
        assert ours.questions[1].pictures[0].source.read() == theirs.questions[1].pictures[0].source.read()


def test_the_limit_is_of_each_subtype(folder: Path) -> None:
    assert [item.id for item in load("bivlc", folder, limit=1).items] == ["0", "2"]


def test_a_type_that_is_lacking_is_told(folder: Path) -> None:
    (note,) = load("bivlc", folder).notes
    assert "1 of 3 kinds are lacking (add)" in note


def test_no_table_says_what_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no data/\*\.parquet.*imirandam/BiVLC"):
        load("bivlc", tmp_path)


def test_an_image_without_bytes_or_path_is_named(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    rows[1]["negative_image"] = {"bytes": None, "path": None}
    write_parquet(tmp_path / "hub" / "test.parquet", rows)
    with pytest.raises(UserError, match=r"test\.parquet, row 1: expected negative_image"):
        load("bivlc", tmp_path / "hub")


def test_an_empty_image_is_a_missing_one(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    rows[1]["negative_image"] = {"bytes": b"", "path": None}
    write_parquet(tmp_path / "hub" / "test.parquet", rows)
    with pytest.raises(UserError, match=r"1 of 4 images of bivlc are missing.*record 1, negative_image"):
        load("bivlc", tmp_path / "hub")


def test_an_image_that_a_row_only_names_is_looked_for_in_the_folder(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    rows[1]["negative_image"] = {"bytes": None, "path": "pictures/x.png"}
    write_parquet(tmp_path / "hub" / "test.parquet", rows)
    draw(tmp_path / "hub" / "pictures" / "x.png")
    source = load("bivlc", tmp_path / "hub").items[1].questions[2].pictures[0].source
    assert str(source) == str(tmp_path / "hub" / "pictures" / "x.png")


def test_kinds_that_are_lacking_are_told_of_the_score_that_is_over_the_others(folder: Path) -> None:
    assert load("bivlc", folder).notes == [
        "bivlc: 1 of 3 kinds are lacking (add); `all` is over the others, and no published number is like it"
    ]
