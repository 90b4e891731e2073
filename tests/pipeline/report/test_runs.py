"""What a page reads from the folders of training runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.report.page import TEACHER, Headline
from pipeline.report.runs import (
    MOST_POINTS,
    held_out_headline,
    loss_panels,
    open_runs,
    settings_table,
    stage_table,
    thinned,
)
from pipeline.run_file import load_run_file, save_run_file
from stages.student.run_folder import RunFolder, StageDescription, StageReport, ValidationReport
from storage.errors import CorruptData, UserError
from storage.stores import open_store

HELD_OUT = {"loss": 1.5, "lm": 1.25}


def make_run(
    folder: Path,
    lines: list[dict[str, Any]],
    *settings: str,
    finished: bool = True,
    held_out: dict[str, float] | None = HELD_OUT,
) -> Path:
    """A run of one stage with these metrics, and these losses on held-out samples."""
    stage = RunFolder(folder).stage("dft")
    stage.path.mkdir(parents=True)
    stage.begin(StageDescription({"decoder": "d", "starts_from": "dpt"}, {}))
    (stage.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_run_file(load_run_file(None, list(settings), {"output": str(folder)}), open_store(folder), "run.yaml")
    if finished:
        validation = ValidationReport(samples=5, losses=held_out, time_share=0.1) if held_out else None
        stage.finish(
            StageReport(
                stage="dft",
                steps=4,
                samples=32,
                trained_parameters=1000,
                seconds=90,
                samples_per_s=2.5,
                wait_share=0,
                losses={"loss": 2.0, "lm": 1.0, "kd": 1.0},
                validation=validation,
            )
        )
    return folder


LINES = [
    {"step": 1, "loss": 4.0, "lm": 3.0, "kd": 1.0},
    {"step": 2, "loss": 3.0, "lm": 2.0, "kd": 1.0, "seconds": 3.0},
    {"step": 2, "validation/loss": 3.5, "validation/lm": 2.5},
]


def test_curves_are_those_of_the_metrics_file_a_chart_for_each_term_with_all_runs_in_it(tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 2.0, "lm": 2.0}]
    runs = open_runs([make_run(tmp_path / "a", LINES), make_run(tmp_path / "b", lines, finished=False)])
    panels = {panel.title: panel.curves for panel in loss_panels(runs)}
    assert list(panels) == ["dft: loss", "dft: lm", "dft: kd"]
    shown = [(curve.model, curve.is_held_out, curve.points) for curve in panels["dft: lm"]]
    assert shown == [("a", False, [(1, 3), (2, 2)]), ("a", True, [(2, 2.5)]), ("b", False, [(1, 2)])]
    assert [curve.model for curve in panels["dft: kd"]] == ["a"]


def test_where_answers_are_all_that_is_learned_the_loss_is_shown_once(tmp_path: Path) -> None:
    runs = open_runs([make_run(tmp_path / "a", [{"step": 1, "loss": 2.0, "lm": 2.0}])])
    assert [panel.title for panel in loss_panels(runs)] == ["dft: lm"]


def test_a_last_line_that_a_kill_cut_short_is_left_out_and_other_damage_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", LINES)
    with (run / "dft" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert len(loss_panels(open_runs([run]))[0].curves[0].points) == 2
    (run / "dft" / "metrics.jsonl").write_text("[1]}\n")
    with pytest.raises(CorruptData, match=r"metrics.jsonl, line 1"):
        loss_panels(open_runs([run]))


def test_values_that_are_no_numbers_leave_no_point(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"step": 1, "loss": None, "lm": 1.0}, {"step": 2, "loss": 2.0, "lm": 1.0, "kd": 1.0}]
    (loss, *_) = loss_panels(open_runs([make_run(tmp_path / "a", lines)]))
    assert loss.curves[0].points == [(2, 2)]


def test_a_long_curve_becomes_means_of_neighbouring_steps(tmp_path: Path) -> None:
    assert thinned([1, 3, 5, 7], 2) == (2, 6)
    assert thinned([1, 2], 2) == (1, 2)
    lines = [{"step": step, "loss": 1.0, "lm": float(step), "kd": 0.0} for step in range(1, 10 * MOST_POINTS + 1)]
    curve = loss_panels(open_runs([make_run(tmp_path / "a", lines)]))[1].curves[0]
    assert len(curve.points) == MOST_POINTS
    assert curve.points[0] == (5.5, 5.5)
    assert curve.points[-1] == (10 * MOST_POINTS - 4.5,) * 2


def test_a_sweeps_folder_stands_for_its_students_also_for_one_that_is_called_as_a_stage_is(tmp_path: Path) -> None:
    for name in ("sft", "logits", TEACHER):
        make_run(tmp_path / "sweep" / name, LINES)
    found = open_runs([tmp_path / "sweep", tmp_path / "sweep" / "logits"])
    assert [run.name for run in found] == ["logits", "sft", str(tmp_path / "sweep" / TEACHER)]


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / folder / "run", LINES) for folder in "ab"]
    assert [run.name for run in open_runs(paths)] == list(map(str, paths))


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_a_place_without_a_run_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"{name} holds no training run: .* is there; name the --output"):
        open_runs([tmp_path / name])


def test_settings_that_differ_from_the_defaults_are_shown_and_those_between_runs_first(tmp_path: Path) -> None:
    both = "train.seed=3"
    runs = open_runs(
        [make_run(tmp_path / "a", [], both), make_run(tmp_path / "b", [], both, "train.dft.attention_weight=0")]
    )
    table = settings_table(runs)
    assert table is not None
    assert table.header == ("setting", "default", "a", "b")
    assert table.rows == (("train.dft.attention_weight", "1.0", "1.0", "0.0"), ("train.seed", "0", "3", "3"))


def test_a_finished_stage_is_a_line_with_its_losses(tmp_path: Path) -> None:
    runs = open_runs([make_run(tmp_path / "a", LINES), make_run(tmp_path / "b", LINES, finished=False)])
    table = stage_table(runs)
    assert table is not None
    assert table.rows == (("a: dft", "4", "32", "1,000", "90", "2.5", "2.0000", "1.5000"),)
    assert stage_table(runs[1:]) is None
    assert [run.seconds for run in runs] == [90, 0]


def test_held_out_losses_have_a_column_where_a_run_has_some(tmp_path: Path) -> None:
    for held_out, cells in ((HELD_OUT, ["held-out loss", "1.5000"]), (None, ["loss at the end", "2.0000"])):
        table = stage_table(open_runs([make_run(tmp_path / str(bool(held_out)), LINES, held_out=held_out)]))
        assert table is not None
        assert [table.header[-1], table.rows[0][-1]] == cells


def test_the_headline_of_held_out_losses_is_of_the_term_that_all_runs_have(tmp_path: Path) -> None:
    # The sum of the first is lower because it has fewer terms.
    fewer = make_run(tmp_path / "fewer", LINES, held_out={"loss": 1.5, "lm": 1.5})
    more = make_run(tmp_path / "more", LINES, held_out={"loss": 3.0, "lm": 1.25, "attention": 1.75})
    assert held_out_headline(open_runs([fewer, more])) == Headline(
        "held-out lm", "1.250", "more, at the end of training"
    )
