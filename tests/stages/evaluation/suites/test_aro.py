import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.evaluation.suites.aro import SYMMETRIC
from storage.errors import UserError
from tests.stages.evaluation.suites.scorer import draw, load, values

SCORES = {"good": -1.0, "bad": -2.0}


def case_of(right: bool, **more: Any) -> dict[str, Any]:
    true, false = ("good", "bad") if right else ("bad", "good")
    box = {"bbox_x": 2, "bbox_y": 1, "bbox_w": 5, "bbox_h": 3}
    return {"image_path": "1.jpg", "true_caption": true, "false_caption": false, **box, **more}


def write(folder: Path, name: str, records: object) -> Path:
    draw(folder / "images" / "1.jpg")
    (folder / f"visual_genome_{name}.json").write_text(json.dumps(records))
    return folder


def relations(folder: Path) -> Path:
    """`on` has 3 of 4, `behind` 0 of 1; `near` is symmetric."""
    rights = [("on", right) for right in (True, True, True, False)] + [("behind", False), ("near", True)]
    return write(folder, "relation", [case_of(right, relation_name=name) for name, right in rights])


def attributions(folder: Path) -> Path:
    """One pair has 25 items, 20 of them right; another has 24, none of them right."""
    rights = [("red", number < 20) for number in range(25)] + [("wet", False)] * 24
    return write(folder, "attribution", [case_of(right, attributes=[name, "big"]) for name, right in rights])


def test_the_makers_number_is_the_mean_over_relations_that_are_not_symmetric(tmp_path: Path) -> None:
    found = values(load("aro", relations(tmp_path)), SCORES)
    assert found["relation"] == {"macro_accuracy": (75 + 0) / 2, "accuracy": round(100 * 4 / 6, 6)}


def test_pairs_of_attributes_with_few_items_are_left_out_of_the_mean(tmp_path: Path) -> None:
    found = values(load("aro", attributions(tmp_path)), SCORES)
    assert found["attribution"] == {"macro_accuracy": 80.0, "accuracy": round(100 * 20 / 49, 6)}


def test_the_average_is_over_both_tasks(tmp_path: Path) -> None:
    found = values(load("aro", attributions(relations(tmp_path))), SCORES)
    assert list(found) == ["relation", "attribution", "average"]
    assert found["average"]["macro_accuracy"] == (37.5 + 80) / 2


def test_one_task_is_enough_and_the_other_is_told_to_be_lacking(tmp_path: Path) -> None:
    loaded = load("aro", relations(tmp_path))
    assert "1 of 2 kinds are lacking (attribution)" in loaded.notes[0]
    assert values(loaded, SCORES)["average"]["macro_accuracy"] == 37.5


def test_relations_that_a_resample_lacks_do_not_count_as_wrong(tmp_path: Path) -> None:
    suite = load("aro", relations(tmp_path)).suite
    counts = {
        "relation": {"items": np.array([2.0, 2.0]), "accuracy": np.array([2.0, 2.0])},
        "relation/on": {"items": np.array([1.0, 2.0]), "accuracy": np.array([1.0, 2.0])},
        "relation/in": {"items": np.array([1.0, np.nan]), "accuracy": np.array([1.0, np.nan])},
    }
    assert suite.metrics(counts)["relation"]["macro_accuracy"].tolist() == [100.0, 100.0]


def test_the_box_of_both_objects_is_cut_out_first(tmp_path: Path) -> None:
    picture = load("aro", relations(tmp_path)).items[0].questions[0].pictures[0]
    assert picture.crop == (2, 1, 7, 4)
    assert picture.load(10**6, "ignore").size == (5, 3)


def test_symmetric_relations_are_names_without_line_ends() -> None:
    assert len(SYMMETRIC) == 157
    assert {"next to", "adjusting", "wrapped in"} <= SYMMETRIC
    assert all(name == name.strip() and "\n" not in name for name in SYMMETRIC)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox_w": 0}, "a box of 0 x 3 pixels"),
        ({"bbox_x": None}, "expected bbox_x"),
        ({"relation_name": 3}, "expected relation_name"),
    ],
)
def test_a_record_of_another_form_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write(tmp_path, "relation", [case_of(True, relation_name="on") | change])
    with pytest.raises(UserError, match=rf"visual_genome_relation\.json, record 0: {message}"):
        load("aro", tmp_path)


def test_an_empty_folder_says_what_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no visual_genome_relation\.json or .*vgr_vga_images\.zip"):
        load("aro", tmp_path)
