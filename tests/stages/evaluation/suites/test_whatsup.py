import json
from pathlib import Path
from typing import Any

import pytest

from stages.evaluation.suites.suite import Likelihood
from storage.errors import UserError
from tests.stages.evaluation.suites.scorer import draw, load, values

A = ("left_of", "right_of", "on", "under")
B = ("left_of", "right_of", "in-front_of", "behind")
SCORES = {"good": -1.0, "bad": -2.0, "worse": -3.0}


def write(folder: Path, name: str, entries: object) -> None:
    (folder / name).write_text(json.dumps(entries))


def pictures(folder: Path, kind: str, rights: dict[str, tuple[str, ...]], places: tuple[str, ...]) -> list[Any]:
    """Entries of sets, by their second object; those places are right."""
    entries = []
    for second, right in rights.items():
        for place in places:
            path = f"data/{kind}/mug_{place}_{second}.jpeg"
            draw(folder / path.removeprefix("data/"))
            first, other = ("good", "bad") if place in right else ("bad", "good")
            entries.append({"image_path": path, "caption_options": [first, other, "worse", "worse"]})
    return entries


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of A's sets one is right, one has a pair and a half, one two halves of pairs; of B's the pair of depth."""
    rights = {"chair": A, "table": ("left_of", "right_of", "on"), "sofa": ("left_of", "under")}
    write(tmp_path, "controlled_images_dataset.json", pictures(tmp_path, "controlled_images", rights, A))
    entries = pictures(tmp_path, "controlled_clevr", {"can": ("in-front_of", "behind")}, B)
    write(tmp_path, "controlled_clevr_dataset.json", entries)
    return tmp_path


def test_pairs_and_sets_want_all_their_pictures_right(folder: Path) -> None:
    found = values(load("whatsup", folder), SCORES)
    assert found["A"] == {
        "accuracy": 100 * 9 / 12,
        "pair": 100 * 3 / 6,
        "set": round(100 * 1 / 3, 6),
    }
    assert found["B"] == {"accuracy": 50.0, "pair": 50.0, "set": 0.0}
    assert found["average"]["accuracy"] == (75 + 50) / 2


def test_a_tie_is_a_miss(folder: Path) -> None:
    loaded = load("whatsup", folder)
    item = loaded.items[0]
    tied = tuple(Likelihood(-1.0, 1, 0.0) for _ in range(4))
    assert loaded.suite.count(item, [tied] * 4, "likelihood") == {"pictures": 4, "accuracy": 0, "pair": 0, "set": False}


def test_a_set_that_lacks_a_picture_has_the_pairs_that_it_has(folder: Path) -> None:
    entries = pictures(folder, "controlled_images", {"chair": A}, A)
    write(folder, "controlled_images_dataset.json", entries[:3])
    found = values(load("whatsup", folder), SCORES)["A"]
    assert found == {"accuracy": 100.0, "pair": pytest.approx(100 * 1 / 1.5), "set": 0.0}


def test_an_item_is_the_pictures_of_two_objects_with_four_captions_each(folder: Path) -> None:
    items = load("whatsup", folder).items
    assert [item.id for item in items] == ["A/mug/chair", "A/mug/table", "A/mug/sofa", "B/mug/can"]
    assert items[3].expected == ["left", "right", "in-front", "behind"]
    assert [len(question.candidates) for question in items[0].questions] == [4, 4, 4, 4]


def test_coco_and_visual_genome_questions_have_two_captions(tmp_path: Path) -> None:
    draw(tmp_path / "val2017" / "000000000139.jpg")
    draw(tmp_path / "vg_images" / "2.jpg")
    write(tmp_path, "coco_qa_two_obj.json", [[139, "good", "bad"], [139, "bad", "good"]])
    write(tmp_path, "vg_qa_one_obj.json", [[2, "good", "bad"]])
    loaded = load("whatsup", tmp_path)
    assert values(loaded, SCORES) == {
        "coco_two": {"accuracy": 50.0},
        "vg_one": {"accuracy": 100.0},
        "average": {"accuracy": 75.0},
    }
    assert "4 of 6 kinds are lacking (A, B, coco_one, vg_two)" in loaded.notes[0]
    assert loaded.items[0].unit == loaded.items[1].unit


@pytest.mark.parametrize(
    ("kind", "metric", "chance"),
    [("A", "accuracy", 25), ("B", "pair", 6.25), ("A", "set", 0.390625), ("vg_one", "accuracy", 50)],
)
def test_chance_follows_the_number_of_captions(folder: Path, kind: str, metric: str, chance: float) -> None:
    suite = load("whatsup", folder).suite
    assert suite.chance_of(kind, metric, "likelihood") == chance
    assert suite.chance_of("average", "accuracy", "likelihood") is None


@pytest.mark.parametrize(
    ("name", "entries", "message"),
    [
        ("coco_qa_one_obj.json", [[1, "x"]], r"coco_qa_one_obj\.json, entry 0: .*expected \[image id"),
        ("coco_qa_one_obj.json", {}, "expected a list of"),
        ("controlled_clevr_dataset.json", [{"image_path": "a_on_b.jpeg", "caption_options": ["x"]}], "four texts"),
        (
            "controlled_clevr_dataset.json",
            [{"image_path": "ab.jpeg", "caption_options": ["x"] * 4}],
            "expected a name as mug_left_of_chair",
        ),
    ],
)
def test_another_layout_is_named(folder: Path, name: str, entries: object, message: str) -> None:
    write(folder, name, entries)
    with pytest.raises(UserError, match=message):
        load("whatsup", folder)


def test_an_empty_folder_says_what_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"controlled_images_dataset\.json or .*github\.com/amitakamath/whatsup_vlms"):
        load("whatsup", tmp_path)
