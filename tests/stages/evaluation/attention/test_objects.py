"""Where objects are is read from lines, masks and suites, and laid over the image tokens."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from stages.evaluation.attention.objects import ObjectPlaces, objects_of_suite, read_objects
from stages.evaluation.attention.token_kinds import token_kinds
from stages.evaluation.config import SuiteConfig
from stages.evaluation.loaded_suite import load_suite
from storage.errors import UserError
from tests.stages.evaluation.suites.suite_folders import draw, write_json

GRID = torch.tensor([[x / 4, y / 4, (x + 1) / 4, (y + 1) / 4] for y in range(4) for x in range(4)])


def tokens(places: ObjectPlaces) -> tuple[list[int], list[int]]:
    kinds = token_kinds(GRID, places)
    return kinds[0].nonzero()[:, 0].tolist(), kinds[1].nonzero()[:, 0].tolist()


def test_a_token_half_covered_is_object_an_untouched_one_background_and_one_between_neither() -> None:
    # The left column and half of the second; a tenth of the third.
    objects, background = tokens(ObjectPlaces(((0.0, 0.0, 0.525, 0.25),)))
    assert objects == [0, 1]
    assert background == [3, *range(4, 16)]


def test_boxes_that_overlap_cover_once_and_masks_add_to_boxes(tmp_path: Path) -> None:
    mask = Image.new("L", (8, 8))
    mask.paste(7, (6, 6, 8, 8))
    mask.save(tmp_path / "mask.png")
    twice = ((0.0, 0.0, 0.1, 0.25), (0.0, 0.0, 0.1, 0.25))
    objects, background = tokens(ObjectPlaces(twice, (tmp_path / "mask.png",)))
    assert objects == [15]
    assert background == list(range(1, 15))


def test_a_token_that_shows_nothing_is_neither() -> None:
    empty = torch.zeros(2, 4)
    is_object, is_background = token_kinds(empty, ObjectPlaces(((0.0, 0.0, 1.0, 1.0),)))
    assert not is_object.any()
    assert not is_background.any()


def test_pictures_are_named_by_sample_image_or_digest(tmp_path: Path) -> None:
    box = [[0.1, 0.1, 0.4, 0.4]]
    lines = [{"sample": "k1", "boxes": box}, {"image": "a/b.png", "boxes": box}]
    lines.append({"sha256": hashlib.sha256(b"bytes").hexdigest(), "boxes": box})
    path = tmp_path / "objects.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    found = read_objects(path)
    assert len(found) == 3
    assert found.of("k1", {}, b"") is not None
    assert found.of("k2", {"id": "k1"}, b"") is not None
    assert found.of("x", {"image": "a/b.png"}, b"") is not None
    assert found.of("x", {"image": ["a/b.png"]}, b"") is not None
    assert found.of("x", {"image": "b.png"}, b"bytes") is not None
    assert found.of("x", {"image": "b.png"}, b"others") is None


def test_lines_about_one_picture_are_joined_and_a_second_mask_is_refused(tmp_path: Path) -> None:
    lines = [{"image": "a", "boxes": [[0, 0, 0.5, 0.5]]}, {"image": "a", "boxes": [[0.5, 0.5, 1, 1]], "mask": "m.png"}]
    path = tmp_path / "o.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    found = read_objects(path)
    assert len(found) == 1
    assert found.by_image["a"] == ObjectPlaces(((0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1)), (tmp_path / "m.png",))
    path.write_text("\n".join(map(json.dumps, [*lines, {"image": "a", "mask": "n.png"}])))
    with pytest.raises(UserError, match=r"o\.jsonl, record 3 gives 'a' a second mask; join them into one"):
        read_objects(path)


MISTAKES = {
    "no name": ({"boxes": [[0, 0, 1, 1]]}, "names its picture by nothing"),
    "two names": ({"sample": "a", "image": "b", "boxes": [[0, 0, 1, 1]]}, "expected one of"),
    "nothing there": ({"sample": "a"}, "neither boxes nor a mask"),
    "pixels": ({"sample": "a", "boxes": [[0, 0, 100, 50]]}, "give fractions"),
    "turned": ({"sample": "a", "boxes": [[0.5, 0, 0.2, 1]]}, "is empty"),
    "three numbers": ({"sample": "a", "boxes": [[0.5, 0, 0.2]]}, "is not left, top, right, bottom"),
    "no list": ({"sample": "a", "boxes": 5}, "expected a list as boxes"),
    "a mask elsewhere": ({"sample": "a", "mask": "../m.png"}, "put masks beside the file"),
    "no object": ("text", "expected an object"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_record_that_is_not_understood_is_named_by_its_number_from_one(mistake: str, tmp_path: Path) -> None:
    line, said = MISTAKES[mistake]
    good = {"sample": "g", "boxes": [[0, 0, 1, 1]]}
    (tmp_path / "o.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(line)}\n")
    with pytest.raises(UserError, match=r"o\.jsonl, record 2:? ") as error:
        read_objects(tmp_path / "o.jsonl")
    assert said in str(error.value)


def test_a_mask_that_is_a_photo_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.png")
    with pytest.raises(UserError, match="one channel"):
        ObjectPlaces((), (tmp_path / "photo.png",)).covered()
    with pytest.raises(UserError, match="is no mask"):
        ObjectPlaces((), (tmp_path / "absent.png",)).covered()


def test_the_boxes_that_r_bench_marks_are_joined_by_picture(tmp_path: Path) -> None:
    picture = tmp_path / "images" / "a.jpg"
    draw(picture)
    records = [
        {"question_id": n, "image": "a.jpg", "text": "Is the cup on the table?", "label": "yes", "subject": "cup",
         "object": "table", "sub_box": [0, 0, 0.5, 0.5], "obj_box": [0.5, 0.5, 1, 1 - n / 10]}
        for n in (1, 2)
    ]  # fmt: skip
    write_json(tmp_path / "instance-level_filterd.json", records)
    for number in range(1, 6):
        write_json(tmp_path / f"instance-level_ids_{number}.json", [1, 2])
    found = objects_of_suite(load_suite("r-bench-boxes", SuiteConfig(data=tmp_path)))
    places = found.by_digest[hashlib.sha256(picture.read_bytes()).hexdigest()]
    assert places.boxes == ((0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 0.9), (0.5, 0.5, 1.0, 0.8))
