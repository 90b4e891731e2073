import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from storage.errors import UserError
from tests.stages.evaluation.suites.scorer import draw, load, values, write_parquet
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
    expected = {"accuracy": 50.0, "accuracy_first_order": 100.0, "accuracy_second_order": 0.0, "unread": 0.0}
    assert values(loaded, SCORES, letter="A")["average"] == expected
    # Of the tie, B is said in both orders: right in the second.
    half, third = 50.0, round(100 / 3, 6)
    found = values(loaded, SCORES)
    whole = {"accuracy": 100.0, "accuracy_first_order": 100.0, "accuracy_second_order": 100.0}
    assert found["add_att"] == whole | {"unread": 0.0}
    assert found["swap_obj"] == {
        "accuracy": half,
        "accuracy_first_order": third,
        "accuracy_second_order": pytest.approx(200 / 3),
        "unread": 0.0,
    }
    assert values(loaded, SCORES, letter="I cannot say.")["average"] == dict.fromkeys(whole, 0.0) | {"unread": 100.0}


def test_kinds_that_are_lacking_are_told(folder: Path) -> None:
    (note,) = load("sugarcrepe", folder).notes
    assert "5 of 7 kinds are lacking (add_obj, replace_att, replace_obj, replace_rel, swap_att)" in note
    for kind in KINDS:
        write(folder, kind, {"0": pair("1.png")})
    assert load("sugarcrepe", folder).notes == []


def test_items_about_one_image_are_drawn_together(folder: Path) -> None:
    assert [item.unit for item in load("sugarcrepe", folder).items] == ["1.png", "1.png", "2.png", "2.png"]


def hub_rows(images: list[bytes]) -> list[dict[str, Any]]:
    return [
        {"image": {"bytes": data, "path": None}, "tested_labels": ["good", "bad"], "true_label": "good"}
        for data in images
    ]


def write_copy(path: Path, colors: str = "red") -> None:
    """A table of the Hub, with a picture of each colour."""
    images = [draw(path.parent.parent / f"{color}.png", color).read_bytes() for color in colors.split()]
    write_parquet(path, hub_rows(images))


@pytest.mark.parametrize("saved", [False, True])
def test_the_copy_of_the_hub_is_read_with_its_pictures_beside_the_other_kinds(saved: bool, tmp_path: Path) -> None:
    images = [draw(tmp_path / f"{color}.png", color).read_bytes() for color in ("red", "blue")]
    rows, hub = hub_rows([*images, images[0]]), tmp_path / "SugarCrepe_swap_obj"
    if saved:
        save_rows(pyarrow.Table.from_pylist(rows), hub)
    else:
        write_parquet(hub / "data" / "test-00000-of-00001.parquet", rows)
    write(hub, "swap_att", {"0": pair("1.png")})
    write(hub, "swap_obj", {"0": pair("missing.png")})
    draw(hub / "val2017" / "1.png")
    loaded = load("sugarcrepe", hub)
    assert [item.id for item in loaded.items] == ["swap_att/0", "swap_obj/0", "swap_obj/1", "swap_obj/2"]
    assert values(loaded, {"good": -1.0, "bad": -2.0})["average"] == {"accuracy": 100.0}
    sources = [item.questions[0].pictures[0].source for item in loaded.items[1:]]
    assert [source.read() for source in sources] == [*images, images[0]]
    assert sources[0] is sources[2]
    assert loaded.items[1].unit == loaded.items[3].unit != loaded.items[2].unit


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("place", "folder"),
    [
        ("SugarCrepe_{}/data/test-00000-of-00001-ee0f.parquet", "SugarCrepe_{}"),
        ("SugarCrepe_{}/data/test-00000-of-00001-ee0f.parquet", "SugarCrepe_{}/data"),
        ("SugarCrepe_{}/data/test-00000-of-00001-ee0f.parquet", "."),
        ("datasets--HuggingFaceM4--SugarCrepe_{}/snapshots/0a1b/data/test-0.parquet", "."),
        ("datasets--HuggingFaceM4--SugarCrepe_{}/snapshots/0a1b/data/test-0.parquet", "*/snapshots/0a1b"),
        ("tables/{}.parquet", "tables"),
    ],
)
def test_the_kind_of_a_copy_is_that_of_its_name(kind: str, place: str, folder: str, tmp_path: Path) -> None:
    write_copy(tmp_path / place.format(kind), "red blue")
    (named,) = tmp_path.glob(folder.format(kind)) if folder != "." else [tmp_path]
    loaded = load("sugarcrepe", named, protocol="compodistill")
    assert [(item.id, item.kinds) for item in loaded.items] == [(f"{kind}/0", (kind,)), (f"{kind}/1", (kind,))]
    assert f"6 of 7 kinds are lacking ({', '.join(one for one in KINDS if one != kind)})" in loaded.notes[0]


def test_copies_of_all_kinds_stand_side_by_side(tmp_path: Path) -> None:
    for number, kind in enumerate(KINDS, 1):
        write_copy(tmp_path / f"SugarCrepe_{kind}/data/test-0.parquet", " ".join(["red"] * number))
    write_copy(tmp_path / "SugarCrepe_add_att/data/test-1.parquet", "blue")  # another part of the same
    loaded = load("sugarcrepe", tmp_path)
    counts = Counter(item.kinds[0] for item in loaded.items)
    assert counts == {kind: number for number, kind in enumerate(KINDS, 1)} | {"add_att": 2}
    assert loaded.notes == []


def test_a_saved_copy_is_of_the_kind_that_it_was_loaded_as(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(hub_rows([draw(tmp_path / "red.png").read_bytes()]))
    save_rows(table, tmp_path / "mine")
    with pytest.raises(UserError, match=r"no name says of which kind .*mine is.*such as SugarCrepe_add_att"):
        load("sugarcrepe", tmp_path / "mine")
    (tmp_path / "mine/dataset_info.json").write_text('{"dataset_name": "sugar_crepe_replace_rel"}')
    assert [item.id for item in load("sugarcrepe", tmp_path / "mine").items] == ["replace_rel/0"]


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (["hub/data/test-0.parquet"], r"of which kind .*test-0\.parquet is; name its folder as the Hub does.*swap_obj"),
        (["hub/readd_atts/test-0.parquet"], "no name says"),
        (["add_att_and_swap_obj/test-0.parquet"], "names several kinds; expected one"),
        (["a/add_att.parquet", "b/add_att.parquet"], r"are both of add_att; expected one copy of it, remove the other"),
    ],
)
def test_a_copy_whose_kind_is_not_said_once_is_refused(places: list[str], message: str, tmp_path: Path) -> None:
    for place in places:
        write_copy(tmp_path / place)
    with pytest.raises(UserError, match=message):
        load("sugarcrepe", tmp_path)


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
