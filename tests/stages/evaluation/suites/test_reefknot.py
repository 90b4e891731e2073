import json
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

YES_NO = "Is the bus driver on bus in this photo? Please answer yes or no."
CHOICE = "What is the relation with knife and apple in this photo? A. behind B. onto C. on D. into, please choose."
FREE = "What is the relation with bag and ground? Please answer in the following format:bag is <relation> ground."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    def record(prompt: str, label: str, relation: str = "perception") -> dict[str, str]:
        return {"image_id": "1592267", "query_prompt": prompt, "label": label, "relation_type": relation}

    data = tmp_path / "Dataset"
    yes_no = [
        record(YES_NO, "yes"),
        record(YES_NO, "no"),
        record(YES_NO, "yes", "cognitive"),
        record(YES_NO, "no", "cognitive"),
    ]
    write_lines(data / "YESNO.jsonl", [*yes_no[:3], yes_no[3] | {"image_id": "2"}])
    write_lines(data / "Multichoice.jsonl", [record(CHOICE, "D"), record(CHOICE, "C", "cognitive")])
    write_lines(data / "VQA.jsonl", [record(FREE, "bag is on ground."), record(FREE, "bag is next to ground.")])
    draw(tmp_path / "VG_100K/1592267.jpg", tmp_path / "VG_100K_2/2.jpg")
    return tmp_path


ANSWERS = {
    "yesno/0": ["Yes"],
    "yesno/1": ["Yes."],
    "yesno/2": ["No"],
    "yesno/3": ["no"],
    "multichoice/0": ["D. into"],
    "multichoice/1": ["The answer is A"],
    "vqa/0": ["bag is on ground."],
    "vqa/1": ["It is next to it."],
}


def test_rates_are_of_each_task_and_relation(folder: Path) -> None:
    loaded = load("reefknot", folder)
    assert prompts(loaded)[0] == YES_NO
    assert loaded.items[0].questions[0].max_new_tokens == 2
    assert pictures(loaded, folder)[2:4] == ["VG_100K/1592267.jpg", "VG_100K_2/2.jpg"]
    found = metrics_of(loaded, ANSWERS)
    halves = {"f1": 50, "accuracy": 50, "precision": 50, "recall": 50, "yes_share": 50, "hallucination_rate": 50}
    assert found["yesno"] == halves
    assert found["yesno_perception"] == halves | {"f1": 66.6667, "recall": 100, "yes_share": 100}
    assert found["yesno_cognitive"] == halves | {"f1": 0, "precision": 0, "recall": 0, "yes_share": 0}
    assert found["multichoice"] == {"hallucination_rate": 50}
    assert found["multichoice_perception"] == {"hallucination_rate": 0}
    assert found["vqa"] == {"hallucination_rate": 0}
    assert found["all"] == {"r_score_without_vqa": 50, "r_score_with_vqa_by_words": 66.6667}


def test_a_free_answer_needs_the_relation_as_words(folder: Path) -> None:
    loaded = load("reefknot", folder)
    assert [item.expected for item in loaded.items if item.id.startswith("vqa/")] == ["on", "next to"]
    item = next(item for item in loaded.items if item.id == "vqa/0")
    counts = [loaded.suite.count(item, [text], "generate") for text in ("bag is ON ground", "bacon")]
    assert counts == [{"hallucination_rate": False}, {"hallucination_rate": True}]


def test_yes_over_no_asks_only_what_is_answered_so(folder: Path) -> None:
    loaded = load("reefknot", folder, protocol="yes_over_no")
    assert [item.id for item in loaded.items] == ["yesno/0", "yesno/1", "yesno/2", "yesno/3"]
    found = metrics_of(loaded, {item.id: [as_likely(-1.0, -0.5)] for item in loaded.items})
    assert found["yesno"]["accuracy"] == 50
    assert "all" not in found


def test_a_missing_task_is_named_with_what_to_fetch(folder: Path) -> None:
    (folder / "Dataset/Multichoice.jsonl").unlink()
    with pytest.raises(UserError, match=r"no Dataset/Multichoice\.jsonl.*github.com/JackChen-seu/Reefknot"):
        load("reefknot", folder)


@pytest.mark.parametrize(
    ("task", "prompt", "label", "message"),
    [
        ("YESNO", YES_NO, "maybe", "label 'maybe'; expected yes or no"),
        ("Multichoice", CHOICE, "E", "label 'E'; expected one of A, B, C, D"),
        ("Multichoice", CHOICE, "AB", "label 'AB'; expected one of A, B, C, D"),
        ("VQA", FREE, "bag is ground.", "label 'bag is ground.' names no relation"),
    ],
)
def test_a_label_that_is_none_is_named(task: str, prompt: str, label: str, message: str, folder: Path) -> None:
    path = folder / f"Dataset/{task}.jsonl"
    record = {"image_id": "2", "query_prompt": prompt, "label": label, "relation_type": "perception"}
    write_lines(path, [*map(json.loads, path.read_text().splitlines()), record])
    with pytest.raises(UserError, match=rf"{task}\.jsonl, record [24]: {message}"):
        load("reefknot", folder)
