"""Whose answers are given to `cdp compare-attention`."""

from pathlib import Path

import pytest

from pipeline.cli.compare_attention import answers_by_student
from storage.errors import UserError
from tests.suite_runs import suite_run


def test_answers_go_to_the_student_that_is_named_or_the_only_one(tmp_path: Path) -> None:
    x, odd = folders = [tmp_path / "x", tmp_path / "a=b"]
    for folder in folders:
        folder.mkdir()
        (folder / "run.json").write_text(suite_run().to_json())
    both = {"first": "runs/first", "second": "runs/second"}
    assert answers_by_student([f"second={x}", f"second={odd}"], both) == {"second": [x, odd]}
    assert answers_by_student([str(x), f"first={x}", str(odd)], {"first": "runs/first"}) == {"first": [x, x, odd]}


@pytest.mark.parametrize("students", [["first"], ["first", "second"], []])
def test_a_name_of_no_student_is_refused_with_those_that_there_are(students: list[str]) -> None:
    shown = ", ".join(students) or "none is given"
    with pytest.raises(UserError, match=f"--answers frist=x does not say of which student.*NAME of: {shown}$"):
        answers_by_student(["frist=x"], {name: name for name in students})
