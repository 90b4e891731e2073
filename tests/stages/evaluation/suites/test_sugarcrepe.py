import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from storage.errors import UserError
from tests.stages.evaluation.suites.scorer import draw, load, values
from tests.stages.samples.saved_rows import save_rows

KINDS = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


def pair(filename: str, caption: str = "good", negative: str = "bad") -> dict[str, Any]:
    return {"filename": filename, "caption": caption, "negative_caption": negative}


def write(folder: Path, kind: str, content: object) -> None:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    (folder / "data" / f"{kind}.json").write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two kinds; keys have a gap, as swap_obj's have."""
    write(tmp_path, "swap_obj", {"107": pair("1.png"), "109": pair("2.png"), "110": pair("2.png", "even", "tied")})
    write(tmp_path, "add_att", {"0": pair("1.png")})
    for name in ("1", "2"):
        draw(tmp_path / "val2017" / f"{name}.png")
    return tmp_path


SCORES = {"good": {"1": -1.0, "2": -9.0}, "bad": -5.0, "even": -4.0, "tied": -4.0}


@pytest.mark.parametrize("protocol", [None, "mean_likelihood", "yes_probability"])
def test_accuracy_is_that_of_each_kind_and_the_average_counts_kinds_alike(folder: Path, protocol: str | None) -> None:
    found = values(load("sugarcrepe", folder, protocol=protocol), SCORES)
    third = round(100 / 3, 6)
    assert found["swap_obj"] == {"accuracy": third}
    assert found["add_att"] == {"accuracy": 100.0}
    assert found["average"] == {"accuracy": pytest.approx((100 + 100 / 3) / 2)}


def test_by_letters_a_model_that_always_says_a_has_half(folder: Path) -> None:
    loaded = load("sugarcrepe", folder, protocol="compodistill")
    expected = {"accuracy": 50.0, "accuracy_first_order": 100.0, "accuracy_second_order": 0.0}
    assert values(loaded, SCORES, letter="A")["average"] == expected
    # Of the tie, B is said in both orders: right in the second.
    half, third = 50.0, round(100 / 3, 6)
    found = values(loaded, SCORES)
    assert found["add_att"] == {"accuracy": 100.0, "accuracy_first_order": 100.0, "accuracy_second_order": 100.0}
    assert found["swap_obj"] == {
        "accuracy": half,
        "accuracy_first_order": third,
        "accuracy_second_order": pytest.approx(200 / 3),
    }


def test_kinds_that_are_lacking_are_told(folder: Path) -> None:
    (note,) = load("sugarcrepe", folder).notes
    assert "5 of 7 kinds are lacking (add_obj, replace_att, replace_obj, replace_rel, swap_att)" in note
    for kind in KINDS:
        write(folder, kind, {"0": pair("1.png")})
    assert load("sugarcrepe", folder).notes == []


def test_items_about_one_image_are_drawn_together(folder: Path) -> None:
    assert [item.unit for item in load("sugarcrepe", folder).items] == ["1.png", "1.png", "2.png", "2.png"]


@pytest.mark.parametrize("saved", [False, True])
def test_the_copy_of_the_hub_is_read_with_its_pictures_beside_the_other_kinds(saved: bool, tmp_path: Path) -> None:
    images = [draw(tmp_path / f"{color}.png", color).read_bytes() for color in ("red", "blue")]
    rows = [
        {"image": {"bytes": data, "path": None}, "tested_labels": ["good", "bad"], "true_label": "good"}
        for data in [*images, images[0]]
    ]
    table = pyarrow.Table.from_pylist(rows)
    if saved:
        save_rows(table, tmp_path / "hub")
    else:
        (tmp_path / "hub" / "data").mkdir(parents=True)
        parquet.write_table(table, tmp_path / "hub" / "data" / "test-00000-of-00001.parquet")
    write(tmp_path / "hub", "swap_att", {"0": pair("1.png")})
    draw(tmp_path / "hub" / "val2017" / "1.png")
    loaded = load("sugarcrepe", tmp_path / "hub")
    assert [item.id for item in loaded.items] == ["swap_att/0", "swap_obj/0", "swap_obj/1", "swap_obj/2"]
    assert values(loaded, {"good": -1.0, "bad": -2.0})["average"] == {"accuracy": 100.0}
    sources = [item.questions[0].pictures[0].source for item in loaded.items[1:]]
    assert [source.read() for source in sources] == [*images, images[0]]
    assert sources[0] is sources[2]
    assert loaded.items[1].unit == loaded.items[3].unit != loaded.items[2].unit


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([pair("1.png")], "swap_obj.json: expected an object of pairs"),
        ({}, "expected an object of pairs"),
        ({"7": {"filename": "1.png", "caption": "good"}}, r"swap_obj.json, pair '7': expected negative_caption"),
        ({"7": pair("../../1.png")}, "leaves the folder"),
    ],
)
def test_another_layout_is_named(folder: Path, content: object, message: str) -> None:
    write(folder, "swap_obj", content)
    with pytest.raises(UserError, match=message):
        load("sugarcrepe", folder)


def test_pictures_of_a_snapshot_of_the_hub_are_found_behind_its_links(tmp_path: Path) -> None:
    hub = tmp_path / "datasets--a--b"
    blob = draw(hub / "blobs/0.png").rename(hub / "blobs/0123")
    picture, pairs = hub / "snapshots/abc/val2017/1.png", hub / "snapshots/abc/swap_obj.json"
    picture.parent.mkdir(parents=True)
    picture.symlink_to("../../../blobs/0123")
    pairs.symlink_to("../../blobs/4567")
    (hub / "blobs/4567").write_text(json.dumps({"0": pair("1.png")}))
    (item,) = load("sugarcrepe", hub / "snapshots/abc").items
    assert item.questions[0].pictures[0].source.read() == blob.read_bytes()


@pytest.mark.parametrize("link", ["val2017/1.png", "val2017"])
def test_a_link_out_of_the_folder_is_named_with_what_to_do(link: str, tmp_path: Path) -> None:
    elsewhere, suite = tmp_path / "elsewhere", tmp_path / "suite"
    draw(elsewhere / "1.png")
    (suite / link).parent.mkdir(parents=True)
    (suite / link).symlink_to(elsewhere / "1.png" if link.endswith(".png") else elsewhere)
    write(suite, "swap_obj", {"0": pair("1.png")})
    with pytest.raises(
        UserError, match=r"'val2017/1.png' is behind a link to .*/elsewhere/1\.png, outside of .*suite;.*--images"
    ):
        load("sugarcrepe", suite)
    assert len(load("sugarcrepe", suite, images=elsewhere).items) == 1


def test_an_empty_folder_says_what_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"holds no data/\*\.json or \*\.json.*github\.com/RAIVNLab/sugar-crepe.*val2017"
    ):
        load("sugarcrepe", tmp_path)


def test_missing_images_are_listed_with_what_to_fetch(folder: Path) -> None:
    (folder / "val2017" / "2.png").unlink()
    with pytest.raises(
        UserError, match=r"1 of 2 images .* 2 of 4 items .*2\.png.*val2017\.zip.*--allow-missing-images"
    ):
        load("sugarcrepe", folder)
    loaded = load("sugarcrepe", folder, allow_missing_images=True)
    assert [item.id for item in loaded.missing] == ["swap_obj/109", "swap_obj/110"]
    assert values(loaded, SCORES)["swap_obj"] == {"accuracy": 100.0}
