"""Models are told apart by name, from each other and from the teacher."""

from pathlib import Path

import pytest

from pipeline.report.shown_names import shown_names


def test_a_model_is_called_by_the_last_part_of_its_path_unless_two_have_the_same() -> None:
    assert shown_names(["runs/a", Path("runs/b"), "somebody/model"]) == ["a", "b", "model"]
    assert shown_names(["x/a", "y/a", "y/b"]) == ["x/a", "y/a", "b"]


def test_no_model_is_called_as_the_teacher_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown_names(["runs/teacher"]) == ["runs/teacher"]
    assert shown_names(["teacher"]) == ["./teacher"]
    assert shown_names([Path("teacher"), Path()]) == ["./teacher", tmp_path.name]
