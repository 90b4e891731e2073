import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from stages.evaluation.caption_pairs import load_pairs

from storage.errors import UserError


def entry(filename: str = "a.png", caption: Any = "A dog.") -> dict[str, Any]:
    return {"filename": filename, "caption": caption, "negative_caption": "A cat."}


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    images = tmp_path / "suite" / "images" / "deep"
    images.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(images.parent / "a.png")
    Image.new("RGB", (4, 4)).save(images / "b.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "outside.png")
    write(tmp_path / "suite", "swap_obj", {"0": entry(), "10": entry("deep/b.png"), "2": entry()})
    write(tmp_path / "suite", "add_att", {"0": entry()})
    return tmp_path / "suite"


def write(folder: Path, kind: str, content: object) -> None:
    (folder / f"{kind}.json").write_text(json.dumps(content))


def test_kinds_come_by_name_and_pairs_in_the_order_of_the_file(suite: Path) -> None:
    pairs = load_pairs(suite)
    assert list(pairs) == ["add_att", "swap_obj"]
    assert [pair.key for pair in pairs["swap_obj"]] == ["0", "10", "2"]
    first = pairs["swap_obj"][0]
    assert (first.kind, first.caption, first.negative_caption) == ("swap_obj", "A dog.", "A cat.")
    assert first.image.samefile(suite / "images" / "a.png")


def test_kinds_and_pairs_can_be_chosen(suite: Path) -> None:
    pairs = load_pairs(suite, kinds=["swap_obj"], limit=2)
    assert {kind: len(of_kind) for kind, of_kind in pairs.items()} == {"swap_obj": 2}


def test_images_may_lie_elsewhere(suite: Path, tmp_path: Path) -> None:
    elsewhere = (suite / "images").rename(tmp_path / "val2017")
    assert len(load_pairs(suite, elsewhere)["swap_obj"]) == 3


@pytest.mark.parametrize("filename", ["../../outside.png", "deep/../../../outside.png", "/etc/hostname"])
def test_a_file_name_that_leaves_the_folder_is_refused(filename: str, suite: Path) -> None:
    write(suite, "swap_obj", {"0": entry(filename)})
    with pytest.raises(UserError, match=r"pair '0'.*leaves the folder"):
        load_pairs(suite)


def test_a_link_that_leaves_the_folder_is_refused(suite: Path) -> None:
    (suite / "images" / "link.png").symlink_to(suite.parent / "outside.png")
    write(suite, "swap_obj", {"0": entry("link.png")})
    with pytest.raises(UserError, match="leaves the folder"):
        load_pairs(suite)


def test_a_missing_image_is_named_with_its_pair(suite: Path) -> None:
    write(suite, "swap_obj", {"0": entry(), "7": entry("c.png")})
    with pytest.raises(UserError, match=r"swap_obj\.json, pair '7': no image 'c\.png'"):
        load_pairs(suite)


def test_broken_json_is_named_with_its_position(suite: Path) -> None:
    (suite / "swap_obj.json").write_text('{"0":\n  {"filename" "a.png"}}')
    with pytest.raises(UserError, match=r"swap_obj\.json is not JSON .*line 2 column 15"):
        load_pairs(suite)


def test_bytes_that_are_not_text_are_named_with_their_position(suite: Path) -> None:
    (suite / "swap_obj.json").write_bytes(b'{"\xff": 1}')
    with pytest.raises(UserError, match=r"swap_obj\.json is not JSON .*position 2"):
        load_pairs(suite)


@pytest.mark.parametrize("content", [[], {}, [entry()], 3])
def test_a_file_that_is_not_an_object_of_pairs_is_refused(content: object, suite: Path) -> None:
    write(suite, "swap_obj", content)
    with pytest.raises(UserError, match="expected an object of pairs"):
        load_pairs(suite)


@pytest.mark.parametrize("broken", [3, {"filename": "a.png"}, entry(caption=["A dog."])])
def test_a_pair_that_lacks_a_field_is_named(broken: object, suite: Path) -> None:
    write(suite, "swap_obj", {"0": entry(), "1": broken})
    with pytest.raises(UserError, match=r"pair '1'.*negative_caption"):
        load_pairs(suite)


def test_an_unknown_kind_is_answered_with_the_known_ones(suite: Path) -> None:
    with pytest.raises(UserError, match="no kind swap_rel; it has add_att, swap_obj"):
        load_pairs(suite, kinds=["swap_rel"])


def test_folders_without_a_suite_are_refused(suite: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no KIND\.json"):
        load_pairs(tmp_path, suite / "images")
    with pytest.raises(UserError, match="is not a folder"):
        load_pairs(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        load_pairs(tmp_path / "nothing")
