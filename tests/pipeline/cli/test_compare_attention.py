"""Whose answers are given to `cdp compare-attention`."""

from pathlib import Path

import pytest

from pipeline.cli.compare_attention import answers_by_student
from storage.errors import UserError


def test_answers_go_to_the_student_that_is_named_or_the_only_one(tmp_path: Path) -> None:
    odd = tmp_path / "a=b"
    odd.mkdir()
    both = {"first": "runs/first", "second": "runs/second"}
    assert answers_by_student(["second=x", "second=y"], both) == {"second": [Path("x"), Path("y")]}
    assert answers_by_student(["x", "first=y", str(odd)], {"first": "runs/first"}) == {
        "first": [Path("x"), Path("y"), odd]
    }


@pytest.mark.parametrize("students", [["first"], ["first", "second"], []])
def test_a_name_of_no_student_is_refused_with_those_that_there_are(students: list[str]) -> None:
    shown = ", ".join(students) or "none is given"
    with pytest.raises(UserError, match=f"--answers frist=x does not say of which student.*NAME of: {shown}$"):
        answers_by_student(["frist=x"], {name: name for name in students})
