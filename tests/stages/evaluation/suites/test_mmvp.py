import csv
from pathlib import Path

import pytest

from stages.evaluation.suites.mmvp import CORRECTED
from storage.errors import UserError
from tests.stages.evaluation.suites.suite_folders import draw, load, metrics_of, pictures, prompts

COLUMNS = ("Index", "Question", "Options", "Correct Answer")


def write_table(folder: Path, answers: list[str], columns: tuple[str, ...] = COLUMNS) -> None:
    folder.mkdir(exist_ok=True)
    with (folder / "Questions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for number, answer in enumerate(answers, 1):
            table.writerow([number, "Is the door open, or shut?", "(a) Open (wide) (b) Shut", answer])
    draw(*(folder / f"MMVP Images/{number}.jpg" for number in range(1, len(answers) + 1)))


def test_a_pair_is_right_with_both_of_its_images(tmp_path: Path) -> None:
    write_table(tmp_path, ["(a)", "(b)", "(b)", "(a)"])
    loaded = load("mmvp", tmp_path)
    assert prompts(loaded)[0] == (
        "Is the door open, or shut?\nA. Open (wide)\nB. Shut\nAnswer with the option's letter from the given choices "
        "directly."
    )
    assert pictures(loaded, tmp_path) == ["MMVP Images/1.jpg", "MMVP Images/3.jpg"]
    found = metrics_of(loaded, {"1-2": ["A", "(b) Shut"], "3-4": ["B", "Shut"]})
    halves = {"pair_accuracy": 50, "pair_accuracy_corrected": 50, "accuracy": 75, "accuracy_corrected": 75}
    assert found == {"all": halves}


def test_four_answers_of_the_published_table_are_also_counted_corrected(tmp_path: Path) -> None:
    published = ["(a)", "(b)"] * 150
    write_table(tmp_path, published)
    loaded = load("mmvp", tmp_path)
    answers = {item.id: list(item.expected["as_published"]) for item in loaded.items}
    found = metrics_of(loaded, answers)["all"]
    assert (found["pair_accuracy"], found["accuracy"]) == (100, 100)
    assert (found["pair_accuracy_corrected"], found["accuracy_corrected"]) == (98.6667, 98.6667)


def test_a_corrected_table_gives_both_alike(tmp_path: Path) -> None:
    answers = ["(a)", "(b)"] * 150
    for number, letter in CORRECTED.items():
        answers[number - 1] = f"({letter.lower()})"
    write_table(tmp_path, answers)
    loaded = load("mmvp", tmp_path)
    assert all(item.expected["as_published"] == item.expected["corrected"] for item in loaded.items)


def test_damaged_tables_are_refused(tmp_path: Path) -> None:
    write_table(tmp_path / "odd", ["(a)"])
    with pytest.raises(UserError, match=r"Questions\.csv: expected an even number of rows.*MMVP/MMVP"):
        load("mmvp", tmp_path / "odd")
    write_table(tmp_path / "answer", ["(a)", "(c)"])
    with pytest.raises(UserError, match=r"row 2: found .*\(c\).*expected"):
        load("mmvp", tmp_path / "answer")
    write_table(tmp_path / "column", ["(a)", "(b)"], ("Index", "Question", "Choices", "Correct Answer"))
    with pytest.raises(UserError, match="Options"):
        load("mmvp", tmp_path / "column")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"lacks Questions\.csv.*MMVP Images"):
        load("mmvp", tmp_path / "none")
