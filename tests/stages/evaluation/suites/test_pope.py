from pathlib import Path

import pytest

from storage.errors import UserError
from tests.stages.evaluation.suites.suite_folders import (
    as_likely,
    draw,
    load,
    metrics_of,
    pictures,
    prompts,
    write_lines,
)
from tests.stages.evaluation.suites.test_yes_no import ANSWERS

SUFFIX = "\nAnswer the question using a single word or phrase."


def records(count: int = 6) -> list[dict[str, object]]:
    labels = list(ANSWERS.values())[:count]
    return [
        {
            "question_id": number,
            "image": f"COCO_val2014_{number // 2:012d}.jpg",
            "text": "Is there a dog?",
            "label": label,
        }
        for number, label in enumerate(labels, 1)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for kind in ("random", "popular"):
        write_lines(tmp_path / f"output/coco/coco_pope_{kind}.json", records())
    draw(*(tmp_path / f"val2014/COCO_val2014_{number:012d}.jpg" for number in range(4)))
    return tmp_path


def test_f1_is_that_of_llavas_script_for_each_sampling_and_in_the_mean(folder: Path) -> None:
    loaded = load("pope", folder)
    assert "1 of 3 kinds are lacking (adversarial)" in loaded.notes[0]
    assert prompts(loaded)[0] == f"Is there a dog?{SUFFIX}"
    assert {item.questions[0].max_new_tokens for item in loaded.items} == {128}
    assert pictures(loaded, folder)[:2] == [
        "val2014/COCO_val2014_000000000000.jpg",
        "val2014/COCO_val2014_000000000001.jpg",
    ]
    answers = {f"popular/{number}": [answer] for number, answer in enumerate(ANSWERS, 1)}
    answers |= {f"random/{number}": [label] for number, label in enumerate(ANSWERS.values(), 1)}
    found = metrics_of(loaded, answers)
    assert found["popular"]["f1"] == pytest.approx(57.1429, abs=1e-4)
    assert found["random"] == {"f1": 100, "accuracy": 100, "precision": 100, "recall": 100, "yes_share": 50}
    assert found["average"]["f1"] == pytest.approx(78.5714, abs=1e-4)
    assert {item.unit for item in loaded.items} == {f"COCO_val2014_{number:012d}.jpg" for number in range(4)}


def test_yes_over_no_is_counted_by_the_same_table(folder: Path) -> None:
    loaded = load("pope", folder, protocol="yes_over_no")
    answers = {item.id: [as_likely(-1.0, -2.0)] for item in loaded.items}
    assert metrics_of(loaded, answers)["average"] == {
        "f1": 66.6667,
        "accuracy": 50,
        "precision": 50,
        "recall": 100,
        "yes_share": 100,
    }


def test_llavas_folder_has_the_labels_beside_its_question_file(folder: Path) -> None:
    (folder / "output/coco").rename(folder / "coco")
    asked = [record | {"text": f"{record['text']}{SUFFIX}", "category": "random"} for record in records()]
    write_lines(folder / "llava_pope_test.jsonl", [{k: v for k, v in one.items() if k != "label"} for one in asked])
    assert [item.kinds[0] for item in load("pope", folder).items] == ["popular"] * 6 + ["random"] * 6


def test_llavas_question_file_with_labels_is_read_by_category_without_a_second_suffix(tmp_path: Path) -> None:
    asked = [record | {"text": f"{record['text']}{SUFFIX}", "category": "adversarial"} for record in records(1)]
    write_lines(tmp_path / "llava_pope_test.jsonl", asked)
    draw(tmp_path / "val2014/COCO_val2014_000000000000.jpg")
    loaded = load("pope", tmp_path)
    assert prompts(loaded) == [f"Is there a dog?{SUFFIX}"]
    assert [item.id for item in loaded.items] == ["adversarial/1"]


def test_llavas_question_file_alone_is_refused_with_what_to_fetch(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "llava_pope_test.jsonl", [{"question_id": 1, "image": "a.jpg", "text": "?", "category": "x"}]
    )
    with pytest.raises(UserError, match=r"question 1 has no label.*coco_pope_.*github\.com/AoiDragon/POPE"):
        load("pope", tmp_path)


def test_an_empty_folder_is_refused_with_what_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no coco_pope_.*github\.com/AoiDragon/POPE.*val2014"):
        load("pope", tmp_path)


def test_missing_images_are_named_with_what_to_fetch(folder: Path) -> None:
    (folder / "val2014/COCO_val2014_000000000001.jpg").unlink()
    with pytest.raises(
        UserError, match=r"1 of 4 images of pope are missing, so 4 of 12 items.*000000000001\.jpg.*val2014\.zip"
    ):
        load("pope", folder)
    assert len(load("pope", folder, allow_missing_images=True).missing) == 4


@pytest.mark.parametrize("label", ["maybe", "", "nope", "yes or no"])
def test_a_label_that_is_neither_yes_nor_no_is_named(label: str, folder: Path) -> None:
    path = folder / "output/coco/coco_pope_random.json"
    write_lines(path, [records()[0], records()[1] | {"label": label}])
    with pytest.raises(UserError, match=rf"coco_pope_random\.json, question 2: label '{label}'; expected yes or no"):
        load("pope", folder)


def test_labels_of_any_size_mean_the_same(folder: Path) -> None:
    for kind in ("random", "popular"):
        asked = [records()[0] | {"label": "YES"}, records()[1] | {"label": "No"}]
        write_lines(folder / f"output/coco/coco_pope_{kind}.json", asked)
    loaded = load("pope", folder)
    assert [item.expected for item in loaded.items] == ["yes", "no"] * 2
    found = metrics_of(loaded, {item.id: ["no"] for item in loaded.items})
    assert found["average"]["accuracy"] == 50
