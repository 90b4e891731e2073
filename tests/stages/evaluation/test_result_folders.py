"""Results are found where commands leave them, and named so that nobody mistakes one for another."""

from pathlib import Path

import pytest

from stages.evaluation.result_folders import result_names, results_below
from storage.errors import UserError


def saved(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{}")
    return folder


def test_results_are_found_in_a_suites_folder_an_output_and_a_run(tmp_path: Path) -> None:
    sugarcrepe, pope = saved(tmp_path / "out/sugarcrepe"), saved(tmp_path / "out/pope")
    assert results_below(sugarcrepe) == [sugarcrepe]
    assert results_below(tmp_path / "out") == [pope, sugarcrepe]
    of_run = saved(tmp_path / "students/sft/suites/pope")
    assert results_below(tmp_path / "students/sft") == results_below(of_run.parent) == [of_run]


def test_what_lies_there_instead_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "run/dft").mkdir(parents=True)
    (tmp_path / "run/dft/stage.json").write_text("{}")
    found = {"none": "nothing", "file": "a file", "empty": "an empty folder", "run": "a training run"}
    for name, instead in found.items():
        with pytest.raises(UserError, match=f"{name} holds no result of `cdp evaluate`: {instead} is there; name its"):
            results_below(tmp_path / name)


def test_a_result_has_the_shortest_name_that_no_other_has() -> None:
    paths = ["/a/demo/teacher/pope", "/a/demo/students/sft/suites/pope", "/a/demo/students/logits/suites/pope"]
    assert result_names([Path(path) for path in paths]) == ["teacher", "sft", "logits"]
    twice = [Path("/a/demo/teacher/pope"), Path("/a/results/teacher/pope"), Path("/a/demo/teacher/pope")]
    assert result_names(twice[:2]) == ["demo/teacher", "results/teacher"]
    assert result_names([twice[0], twice[0]]) == [str(twice[0])] * 2
