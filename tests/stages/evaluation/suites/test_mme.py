from pathlib import Path

import pytest

from stages.evaluation.suites.mme import TASKS, mme_answer
from storage.errors import UserError
from tests.stages.evaluation.suites.suite_folders import as_likely, draw, load, metrics_of, prompts

ROOT = "MME_Benchmark_release_version/MME_Benchmark"
IN_FOLDERS = ("artwork", "celebrity", "landmark", "posters", "scene")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for task in (task for tasks in TASKS.values() for task in tasks):
        root = tmp_path / ROOT / task
        texts, images = (root / "questions_answers_YN", root / "images") if task in IN_FOLDERS else (root, root)
        for stem in ("a", "b") if task == "OCR" else ("c",):
            draw(images / f"{stem}.{'png' if task == 'count' else 'jpg'}")
            texts.mkdir(exist_ok=True)
            lines = "Is it a dog? Please answer yes or no.\tYes\nIs it a cat? Please answer yes or no.\tNo\n"
            (texts / f"{stem}.txt").write_text(lines)
    return tmp_path


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("Yes.", "yes"),
        ("Nope", "no"),
        ("y", "yes"),
        ("  YES, it is", "yes"),
        ("not sure", "no"),
        ("The yes", "other"),
        ("Unknown", "other"),
        ("I no", "no"),
        ("x", "other"),
        ("", "other"),
    ],
)
def test_answers_are_read_as_the_makers_do(answer: str, found: str) -> None:
    assert mme_answer(answer) == found


def test_points_of_tasks_are_added_up(folder: Path) -> None:
    loaded = load("mme", folder)
    assert len(loaded.items) == 15
    assert prompts(loaded)[0] == "Is it a dog?\nAnswer the question using a single word or phrase."
    answers = {"OCR/a": ["Yes", "No"], "OCR/b": ["yes", "yes"], "count/c": ["Yes.", "no"]}
    found = metrics_of(loaded, answers)
    assert found["OCR"] == {"accuracy": 75, "accuracy_plus": 50, "yes_share": 75, "score": 125}
    assert found["count"]["score"] == 200
    total = {"perception": 325, "cognition": 0, "sum": 325, "percent_of_2800": 11.6071}
    assert found["total"] == total


def test_all_tasks_right_make_2800_points(folder: Path) -> None:
    loaded = load("mme", folder)
    found = metrics_of(loaded, {item.id: ["yes", "no"] for item in loaded.items})
    assert found["total"] == {"perception": 2000, "cognition": 800, "sum": 2800, "percent_of_2800": 100}


def test_a_tie_of_yes_and_no_is_wrong_both_ways(folder: Path) -> None:
    loaded = load("mme", folder, protocol="yes_over_no")
    found = metrics_of(loaded, {"count/c": [as_likely(-1.0, -1.0)] * 2})
    assert found["count"] == {"accuracy": 0, "accuracy_plus": 0, "yes_share": 0, "score": 0}


def test_a_missing_task_and_a_file_of_one_line_are_named(folder: Path) -> None:
    path = folder / ROOT / "count/c.txt"
    path.write_text("Is it a dog? Please answer yes or no.\tYes\n")
    with pytest.raises(UserError, match=r"count/c\.txt: expected two lines.*MME_Benchmark_release_version\.zip"):
        load("mme", folder)
    path.unlink()
    with pytest.raises(UserError, match=r"holds no .*count/\*\.txt.*MME_Benchmark_release_version\.zip"):
        load("mme", folder)
