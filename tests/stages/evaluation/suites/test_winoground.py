import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from storage.errors import UserError
from tests.stages.evaluation.suites.scorer import draw, load, values, write_parquet

SCORES = {
    # Text right for both, image right for the first caption only.
    "a dog on a mat": {"ex_0_img_0": -1.0, "ex_0_img_1": -3.0},
    "a mat on a dog": {"ex_0_img_0": -2.0, "ex_0_img_1": -2.5},
    # All right.
    "red and blue": {"ex_1_img_0": -1.0, "ex_1_img_1": -2.0},
    "blue and red": {"ex_1_img_0": -2.0, "ex_1_img_1": -1.0},
}


def example(number: int, first: str, second: str, tag: str, preds: int) -> dict[str, Any]:
    return {
        "id": number,
        "image_0": f"ex_{number}_img_0",
        "image_1": f"ex_{number}_img_1",
        "caption_0": first,
        "caption_1": second,
        "tag": "Scope",
        "secondary_tag": "",
        "num_main_preds": preds,
        "collapsed_tag": tag,
    }


EXAMPLES = [
    example(0, "a dog on a mat", "a mat on a dog", "Object", 1),
    example(1, "red and blue", "blue and red", "Both", 2),
]
NAMES = [f"ex_{number}_img_{place}.png" for number in (0, 1) for place in (0, 1)]
LINES = "".join(f"{json.dumps(one)}\n" for one in EXAMPLES)


def hub(folder: Path) -> None:
    """data/examples.jsonl and data/images.zip."""
    (folder / "data").mkdir()
    (folder / "data" / "examples.jsonl").write_text(LINES)
    with ZipFile(folder / "data" / "images.zip", "w") as archive:
        for name in NAMES:
            archive.write(draw(folder / "drawn.png"), f"images/{name}")


def t2v(folder: Path) -> None:
    """examples.jsonl with tags of why it is hard, and a folder of images."""
    (folder / "examples.jsonl").write_text(LINES)
    for name in NAMES:
        draw(folder / "images" / name)


def local(folder: Path) -> None:
    """data.json, which need not name the images."""
    (folder / "data.json").write_text(
        json.dumps([{k: v for k, v in one.items() if not k.startswith("image_")} for one in EXAMPLES])
    )
    for name in NAMES:
        draw(folder / "images" / name)


@pytest.mark.parametrize("layout", [hub, t2v, local])
@pytest.mark.parametrize("protocol", [None, "likelihood"])
def test_text_image_and_group_are_those_of_the_makers(
    layout: Callable[[Path], None], protocol: str | None, tmp_path: Path
) -> None:
    layout(tmp_path)
    found = values(load("winoground", tmp_path, protocol=protocol), SCORES)
    assert found["all"] == {"text": 100.0, "image": 50.0, "group": 50.0}
    assert found["Object"] == found["1 Main Pred"] == {"text": 100.0, "image": 0.0, "group": 0.0}
    assert found["Both"] == found["2 Main Pred"] == {"text": 100.0, "image": 100.0, "group": 100.0}


def test_by_letters_only_text_is_scored(tmp_path: Path) -> None:
    hub(tmp_path)
    loaded = load("winoground", tmp_path, protocol="compodistill")
    assert values(loaded, SCORES)["all"] == {"text": 100.0, "unread": 0.0}
    assert values(loaded, SCORES, letter="A")["all"] == {"text": 0.0, "unread": 0.0}


def test_the_tags_of_why_it_is_hard_are_kinds(tmp_path: Path) -> None:
    t2v(tmp_path)
    (tmp_path / "why_winoground_hard.json").write_text(
        json.dumps({"0": ["UnusualImage", "VisuallyDifficult"], "1": []})
    )
    kinds = [item.kinds for item in load("winoground", tmp_path).items]
    assert kinds == [
        ("Object", "1 Main Pred", "UnusualImage", "VisuallyDifficult", "all"),
        ("Both", "2 Main Pred", "No Tag", "all"),
    ]


def test_pictures_are_read_out_of_the_archive(tmp_path: Path) -> None:
    hub(tmp_path)
    source = load("winoground", tmp_path).items[1].questions[2].pictures[0].source
    assert str(source) == f"{tmp_path / 'data' / 'images.zip'}: images/ex_1_img_1.png"
    assert source.read() == (tmp_path / "drawn.png").read_bytes()


def test_a_named_folder_of_images_comes_before_the_archive(tmp_path: Path) -> None:
    hub(tmp_path)
    for name in NAMES:
        draw(tmp_path / "mine" / name)
    source = load("winoground", tmp_path, images=tmp_path / "mine").items[0].questions[0].pictures[0].source
    assert str(source) == str(tmp_path / "mine" / "ex_0_img_0.png")


def test_a_table_that_holds_the_images_is_read_too(tmp_path: Path) -> None:
    data = draw(tmp_path / "drawn.png").read_bytes()
    image = {"bytes": data, "path": "ex_0_img_0.png"}
    write_parquet(tmp_path / "hub" / "test.parquet", [one | {"image_0": image, "image_1": image} for one in EXAMPLES])
    assert load("winoground", tmp_path / "hub").items[1].questions[0].pictures[0].source.read() == data


def test_images_that_are_neither_in_the_archive_nor_in_the_folder_are_listed(tmp_path: Path) -> None:
    hub(tmp_path)
    with ZipFile(tmp_path / "data" / "images.zip", "w") as archive:
        for name in NAMES[:-1]:
            archive.write(tmp_path / "drawn.png", f"images/{name}")
    with pytest.raises(
        UserError, match=r"1 of 4 images .*ex_1_img_1\.png; fetch data/examples\.jsonl and data/images\.zip"
    ):
        load("winoground", tmp_path)


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    hub(tmp_path)
    archive = tmp_path / "data" / "images.zip"
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"images\.zip is no whole zip archive.*fetch it again"):
        load("winoground", tmp_path)


def test_an_empty_folder_says_what_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no data/examples\.jsonl or .*facebook/winoground.*accept its terms"):
        load("winoground", tmp_path)


def test_a_damaged_picture_of_the_archive_is_named_when_it_is_read(tmp_path: Path) -> None:
    hub(tmp_path)
    archive = tmp_path / "data" / "images.zip"
    content = archive.read_bytes()
    at = content.index(b"IHDR")
    archive.write_bytes(content[:at] + b"XXXX" + content[at + 4 :])
    source = load("winoground", tmp_path).items[0].questions[0].pictures[0].source
    with pytest.raises(UserError, match=r"images\.zip: images/ex_0_img_0\.png cannot be unpacked"):
        source.read()
