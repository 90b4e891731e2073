import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from stages.evaluation.suites.natural_bench import NaturalBench
from storage.errors import UserError
from tests.stages.evaluation.suites.suite_folders import as_likely, load, metrics_of, prompts
from tests.stages.samples.saved_rows import save_rows

GOLDEN = [[1, 0, 0, 1], [1, 1, 0, 1], [1, 0, 1, 1], [0, 0, 0, 0], [-1, 0, 0, 1]]
YES_NO, LETTERS = {1: "Yes", 0: "no.", -1: "maybe"}, {1: "A", 0: "b", -1: "C"}


def cell(color: str) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), color).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{color}.png"}


def write_table(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "data").mkdir(parents=True)
    parquet.write_table(pa.Table.from_pylist(rows), folder / "data/train-00000-of-00001.parquet")


def groups(column: str = "Question_Type") -> list[dict[str, Any]]:
    pictures = {"Image_0": cell("red"), "Image_1": cell("blue")}
    kinds = ["yes_no"] * 4 + ["multiple_choice"]
    return [{"Question_0": "Q0?", "Question_1": "Q1?", column: kind, **pictures} for kind in kinds]


def test_accuracies_are_those_of_the_makers_script(tmp_path: Path) -> None:
    write_table(tmp_path, groups())
    loaded = load("naturalbench", tmp_path)
    assert prompts(loaded)[:3] == [
        "Q0? Please answer Yes or No.",
        "Q0? Please answer Yes or No.",
        "Q1? Please answer Yes or No.",
    ]
    assert prompts(loaded)[-1] == "Q1? Please output the letter corresponding to the correct option."
    shown = [str(one.pictures[0].source).rsplit(": ")[-1] for one in loaded.items[0].questions]
    assert shown == [f"record 0, Image_{number}" for number in (0, 1, 0, 1)]
    words = [YES_NO] * 4 + [LETTERS]
    answers = {str(number): [words[number][one] for one in four] for number, four in enumerate(GOLDEN)}
    found = metrics_of(loaded, answers)
    assert found["all"] == {
        "group_accuracy": 20,
        "question_accuracy": 50,
        "image_accuracy": 50,
        "accuracy": 75,
        "yes_share": 45,
    }
    assert found["multiple_choice"]["accuracy"] == 75


def test_a_table_of_single_questions_gives_the_same_items(tmp_path: Path) -> None:
    grouped, flat = tmp_path / "grouped", tmp_path / "flat"
    write_table(grouped, groups("Question Type"))
    colors = {0: cell("red"), 1: cell("blue")}
    rows = [
        {
            "Index": str(4 * number + 2 * question + image),
            "Question": f"Q{question}?",
            "Image": colors[image],
            "Question_Type": kind,
        }
        for number, kind in enumerate(["yes_no"] * 4 + ["multiple_choice"])
        for question in (0, 1)
        for image in (0, 1)
    ]
    write_table(flat, rows)
    first, second = load("naturalbench", grouped), load("naturalbench", flat)
    assert prompts(first) == prompts(second)
    assert [item.kinds for item in first.items] == [item.kinds for item in second.items]
    shown = [
        [one.pictures[0].source.read() for item in loaded.items for one in item.questions] for loaded in (first, second)
    ]
    assert shown[0] == shown[1]


def test_options_are_compared_by_their_first_tokens(tmp_path: Path) -> None:
    write_table(tmp_path, groups())
    loaded = load("naturalbench", tmp_path, protocol="yes_over_no")
    assert [item.questions[0].candidates for item in loaded.items][3:] == [("Yes", "No"), ("A", "B")]
    yes, no, tie = as_likely(-1.0, -2.0), as_likely(-2.0, -1.0), as_likely(-1.0, -1.0)
    assert metrics_of(loaded, {"4": [yes, no, no, yes]})["all"]["group_accuracy"] == 100
    assert metrics_of(loaded, {"4": [yes, tie, no, yes]})["all"]["accuracy"] == 75


def test_tables_with_other_columns_or_a_cut_group_are_refused(tmp_path: Path) -> None:
    write_table(tmp_path / "cut", [{"Question": "Q?", "Image": cell("red"), "Question_Type": "yes_no"}] * 3)
    with pytest.raises(UserError, match="row 0: the group has 3 rows of questions; expected four"):
        load("naturalbench", tmp_path / "cut")
    write_table(tmp_path / "type", [groups()[0] | {"Question_Type": "open"}])
    with pytest.raises(UserError, match="question type 'open'; expected yes_no or multiple_choice"):
        load("naturalbench", tmp_path / "type")
    write_table(tmp_path / "bare", [groups()[0] | {"Image_0": "red.png"}])
    with pytest.raises(UserError, match=r"row 0, Image_0: expected the bytes of an image file, found 'red\.png'"):
        load("naturalbench", tmp_path / "bare")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"holds no data/\*\.parquet.*BaiqiL/NaturalBench"):
        load("naturalbench", tmp_path / "none")


def test_chance_is_that_of_coins() -> None:
    assert NaturalBench.chance["group_accuracy"] == 100 / 2**4


def test_a_saved_data_set_gives_the_same_items(tmp_path: Path) -> None:
    write_table(tmp_path / "hub", groups())
    save_rows(pa.Table.from_pylist(groups()), tmp_path / "saved")
    first, second = load("naturalbench", tmp_path / "hub"), load("naturalbench", tmp_path / "saved")
    assert prompts(first) == prompts(second)
    shown = [[one.pictures[0].source.read() for one in loaded.items[0].questions] for loaded in (first, second)]
    assert shown[0] == shown[1]
