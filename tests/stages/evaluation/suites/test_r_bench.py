from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from storage.errors import UserError
from tests.stages.evaluation.suites.scorer import write_parquet
from tests.stages.evaluation.suites.suite_folders import draw, load, metrics_of, prompts, write_json
from tests.stages.evaluation.suites.test_yes_no import ANSWERS

RED, GREEN, GREY = (250, 0, 45), (100, 250, 0), (100, 100, 100)


def records(**more: Any) -> list[dict[str, Any]]:
    return [
        {"question_id": number, "image": f"{number % 2}.png", "text": "Is the dog on the box?", "label": label, **more}
        for number, label in enumerate(ANSWERS.values())
    ]


def write_suite(folder: Path, level: str, ids: str, questions: list[dict[str, Any]]) -> None:
    write_json(folder / f"data_filterd/{level}_filterd.json", questions)
    for number, subset in enumerate([[0, 1, 2, 3, 4, 5], [0, 5], [0], [1], [3, 77]], 1):
        write_json(folder / f"data_filterd/{ids}_{number}.json", subset)
    draw(folder / "images/0.png", folder / "images/1.png", color="rgb(100,100,100)", size=(40, 20))


def instances() -> list[dict[str, Any]]:
    return records(subject="Dog", object="Box", sub_box=[0.25, 0, 0.75, 0.5], obj_box=[0.0, 0.5, 0.5, 1.0])


def test_metrics_are_the_means_over_five_subsets_of_the_makers_script(tmp_path: Path) -> None:
    write_suite(tmp_path, "image-level", "nocaps_image-level_rel_ids", records())
    loaded = load("r-bench-image", tmp_path)
    assert prompts(loaded)[0] == "Is the dog on the box?"
    found = metrics_of(loaded, {str(number): [answer] for number, answer in enumerate(ANSWERS)})
    assert found["subset_1"] == pytest.approx(
        {"f1": 57.1422, "accuracy": 50, "precision": 49.9999, "recall": 66.6664, "yes_share": 66.6667}, abs=2e-4
    )
    # Right, wrong; right; right (a no); wrong (the second sentence does not count, so a yes, which is right).
    assert [found[f"subset_{number}"]["accuracy"] for number in range(1, 6)] == [50, 50, 100, 100, 100]
    assert found["average"]["accuracy"] == 80
    assert found["subset_3"]["f1"] == pytest.approx(100 * 2 / (2 + 3e-5), abs=1e-3)


def test_questions_of_no_subset_are_not_asked(tmp_path: Path) -> None:
    questions = [*records(), {"question_id": 6, "image": "0.png", "text": "Is it?", "label": "yes"}]
    write_suite(tmp_path, "image-level", "nocaps_image-level_rel_ids", questions)
    assert [item.id for item in load("r-bench-image", tmp_path).items] == list("012345")


def test_boxes_are_drawn_and_named_in_the_question(tmp_path: Path) -> None:
    write_suite(tmp_path, "instance-level", "instance-level_ids", instances())
    loaded = load("r-bench-boxes", tmp_path)
    # The second replacement also meets the word that the first one brought; the makers' script does the same.
    assert prompts(loaded)[0] == (
        "Is the dog in red bounding box in green bounding box on the box in green bounding box?"
    )
    pixels = np.asarray(loaded.items[0].questions[0].pictures[0].load(1000, "ignore"))
    assert tuple(pixels[0, 20]) == (255, 0, 0)
    assert tuple(pixels[10, 5]) == (0, 128, 0)
    assert tuple(pixels[2, 2]) == GREY


def test_masks_are_tinted_and_named_in_the_question(tmp_path: Path) -> None:
    write_suite(tmp_path, "instance-level", "instance-level_ids", instances())
    mask = np.zeros((10, 20), np.uint8)
    mask[:, :5], mask[:, 15:] = 1, 2
    (tmp_path / "data_filterd/instance_mask").mkdir()
    for number in range(6):
        Image.fromarray(mask).save(tmp_path / f"data_filterd/instance_mask/{number}.png")
    loaded = load("r-bench-masks", tmp_path)
    assert prompts(loaded)[0] == "Is the dog in red mask on the box in green mask?"
    pixels = np.asarray(loaded.items[0].questions[0].pictures[0].load(1000, "ignore")).astype(float)
    alpha = 120 / 255
    for column, tint in ((0, RED), (9, RED), (30, GREEN), (39, GREEN)):
        assert pixels[5, column] == pytest.approx(np.array(GREY) * (1 - alpha) + np.array(tint) * alpha, abs=1)
    assert tuple(pixels[5, 10]) == tuple(pixels[5, 29]) == GREY
    grey = np.asarray(loaded.items[0].questions[0].pictures[0].load(1000, "ignore", blank=True))
    assert (grey == 127).all()


def test_a_missing_mask_is_a_missing_image(tmp_path: Path) -> None:
    write_suite(tmp_path, "instance-level", "instance-level_ids", instances())
    with pytest.raises(UserError, match=r"6 of 8 images.*instance_mask/0\.png.*R-Bench"):
        load("r-bench-masks", tmp_path)


def test_a_mask_of_colours_is_refused(tmp_path: Path) -> None:
    write_suite(tmp_path, "instance-level", "instance-level_ids", instances())
    draw(*(tmp_path / f"data_filterd/instance_mask/{number}.png" for number in range(6)))
    picture = load("r-bench-masks", tmp_path).items[0].questions[0].pictures[0]
    with pytest.raises(UserError, match=r"0\.png: 40x30 pixels of mode RGB; expected a mask of one channel"):
        picture.load(10_000, "ignore")


def test_missing_subsets_and_damaged_boxes_are_named(tmp_path: Path) -> None:
    broken = instances()
    broken[0]["sub_box"] = [0.75, 0, 0.25, 1]
    write_suite(tmp_path, "instance-level", "instance-level_ids", broken)
    with pytest.raises(UserError, match=r"question 0: sub_box is \[0.75, 0, 0.25, 1\]; expected left, top"):
        load("r-bench-boxes", tmp_path)
    (tmp_path / "data_filterd/instance-level_ids_3.json").unlink()
    with pytest.raises(UserError, match=r"lacks data_filterd/instance-level_ids_3\.json; .*mrwu-mac/R-Bench"):
        load("r-bench-boxes", tmp_path)
    with pytest.raises(UserError, match=r"holds no data_filterd/image-level_filterd\.json.*mrwu-mac/R-Bench"):
        load("r-bench-image", tmp_path)


@pytest.mark.parametrize("edge", [1.5, -0.1, 10**400, "1"])
def test_a_box_beyond_the_picture_is_named(edge: object, tmp_path: Path) -> None:
    questions = instances()
    questions[0]["sub_box"] = [0, 0, 1, edge]
    write_suite(tmp_path, "instance-level", "instance-level_ids", questions)
    with pytest.raises(UserError, match=r"question 0: sub_box is .*expected left, top"):
        load("r-bench-boxes", tmp_path)


@pytest.mark.parametrize("ids", [[[1]], [{"a": 1}], ["1"], [None]])
def test_ids_of_a_subset_that_are_no_numbers_are_named(ids: list[object], tmp_path: Path) -> None:
    write_suite(tmp_path, "image-level", "nocaps_image-level_rel_ids", records())
    write_json(tmp_path / "data_filterd/nocaps_image-level_rel_ids_3.json", ids)
    with pytest.raises(UserError, match=r"rel_ids_3\.json: .* is no question's id; expected a list of integers"):
        load("r-bench-image", tmp_path)


def test_a_label_that_is_neither_yes_nor_no_is_named(tmp_path: Path) -> None:
    questions = records()
    questions[3]["label"] = "unsure"
    write_suite(tmp_path, "image-level", "nocaps_image-level_rel_ids", questions)
    with pytest.raises(UserError, match=r"image-level_filterd\.json, question 3: label 'unsure'; expected yes or no"):
        load("r-bench-image", tmp_path)


@pytest.mark.parametrize("name", ["subject", "object"])
@pytest.mark.parametrize("suite", ["r-bench-boxes", "r-bench-masks"])
def test_an_object_without_a_name_is_named_and_not_put_between_all_letters(
    name: str, suite: str, tmp_path: Path
) -> None:
    questions = instances()
    questions[1][name] = " "
    write_suite(tmp_path, "instance-level", "instance-level_ids", questions)
    with pytest.raises(UserError, match=r"question 1: subject .* and object .*; expected the names of two things"):
        load(suite, tmp_path)


def write_copy(folder: Path, levels: Sequence[str]) -> None:
    """The Hub's copy, with the questions of `instances` in turn at these levels."""
    draw(folder / "0.png", color="rgb(100,100,100)", size=(40, 20))
    image = {"bytes": (folder / "0.png").read_bytes(), "path": None}
    rows = [
        {name: value for name, value in record.items() if name not in ("text", "image")}
        | {"question": record["text"], "image": image, "level": levels[at % len(levels)], "qtype": "x"}
        for at, record in enumerate(instances())
    ]
    write_parquet(folder / "data/test-00000-of-00001.parquet", rows)


@pytest.mark.parametrize("levels", [("image", "instance"), ("image-level", "instance-level")])
def test_the_hubs_copy_is_asked_by_level_and_said_to_lack_the_subsets(levels: Sequence[str], tmp_path: Path) -> None:
    write_copy(tmp_path, levels)
    images, boxes = load("r-bench-image", tmp_path), load("r-bench-boxes", tmp_path)
    assert [[item.id for item in loaded.items] for loaded in (images, boxes)] == [list("024"), list("135")]
    assert prompts(images)[0] == "Is the dog on the box?"
    assert "dog in red bounding box" in prompts(boxes)[0]
    picture = boxes.items[0].questions[0].pictures[0].load(1000, "ignore")
    assert picture.getpixel((10, 5)) == (255, 0, 0)
    assert "5 of 5 kinds are lacking (subset_1" in images.notes[0]
    found = metrics_of(images, {"0": ["Yes"], "2": ["no"], "4": ["no"]})
    assert list(found) == ["no_subset", "average"]
    with pytest.raises(UserError, match=r"instance_mask/1\.png"):
        load("r-bench-masks", tmp_path)


def test_another_level_in_the_hubs_copy_is_named(tmp_path: Path) -> None:
    write_copy(tmp_path, ["scene"])
    with pytest.raises(UserError, match="row 0: level 'scene'; expected image or instance"):
        load("r-bench-image", tmp_path)
