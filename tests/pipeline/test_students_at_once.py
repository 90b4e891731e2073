"""Students of a sweep that train at the same time: the same weights as in turn, and none is lost by another's end."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from pipeline.students_at_once import students_at_once
from pipeline.sweep import SweepReport, run_sweep
from pipeline.sweep_file import load_sweep
from storage.progress import SILENT
from tests.conftest import TinyWorld
from tests.pipeline.processes import cdp, run_here, start_cdp
from tests.pipeline.test_sweep import write
from tests.pipeline.training_kills import weights
from tests.processes import PATIENCE_S

SHARED = """\
train:
  stages: [dpt]
  loader: {microbatch_size: 4, num_workers: 0}
  parallel: {precision: fp32}
  logging: {every: 1}
  checkpoint: {every: 1}
  dpt: {batch_size: 4, max_steps: 4, epochs: 1000}
"""


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


def sweep_file(folder: Path, tiny: TinyWorld, targets: Path, students: str) -> Path:
    places = f"samples: {tiny.samples}\ntargets: {targets}\nstudent: {tiny.student_lm}\n"
    return write(folder / "sweep.yaml", places + SHARED + f"students: {students}\n")


def saved(output: Path) -> SweepReport:
    return SweepReport.model_validate_json((output / "sweep.json").read_text())


def test_students_at_once_get_the_weights_of_students_in_turn_and_a_failure_is_named_at_the_end(
    tiny: TinyWorld, targets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = sweep_file(tmp_path, tiny, targets, "{a: {}, nowhere: {student: nowhere}, b: {train.dpt.kd_weight: 0}}")
    for name, more in (("turn", ()), ("once", ("--at-once", 3))):
        arguments = ("train-student", "--sweep", sweep, "--output", tmp_path / name, *more)
        done = run_here(*arguments, monkeypatch=monkeypatch, capsys=capsys)
        assert done.code == 1
        assert "student nowhere failed: no checkpoint at nowhere" in done.err
        assert [line for line in done.err.splitlines() if line.startswith("b dpt: 4 of 4 steps")], done.err
        assert list(saved(tmp_path / name).students) == ["a", "b"]
    for name in ("a", "b"):
        assert weights(tmp_path / "once" / name, "dpt") == weights(tmp_path / "turn" / name, "dpt")


def test_a_student_whose_process_is_killed_is_reported_and_the_others_are_trained(
    tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    path = sweep_file(tmp_path, tiny, targets, "{endless: {train.dpt.max_steps: 100000}, short: {}}")
    sweep = load_sweep(path, None, [], {"output": str(tmp_path / "out")})
    begun, done = tmp_path / "out/endless/dpt/metrics.jsonl", tmp_path / "out/short/dpt/report.json"

    def kill_the_endless() -> None:
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            if begun.exists() and done.exists() and len(multiprocessing.active_children()) == 1:
                break
            time.sleep(0.05)
        for process in multiprocessing.active_children():
            process.kill()

    killer = threading.Thread(target=kill_the_endless)
    killer.start()
    report = run_sweep(sweep, students_at_once(sweep, 2, SILENT))
    killer.join()
    assert list(report.students) == ["short"]
    assert report.failures["endless"].startswith("its process was ended by signal 9 and did not say why")


@pytest.mark.slow
def test_students_that_are_asked_to_stop_save_a_checkpoint_each_and_go_on_to_the_same_weights(
    tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    students = "{a: {}, b: {train.seed: 1}, later: {}}"
    sweep = sweep_file(tmp_path, tiny, targets, students)
    steps = ("--set", "train.dpt.max_steps=60")
    whole = cdp("train-student", "--sweep", sweep, "--output", tmp_path / "whole", *steps)
    assert whole.code == 0, whole.err
    out, err = tmp_path / "stopped", tmp_path / "err.txt"
    arguments = ("train-student", "--sweep", sweep, "--output", out, "--at-once", 2, *steps)
    process = start_cdp(*arguments, err=err)
    until = time.monotonic() + PATIENCE_S
    while not all((out / name / "dpt/metrics.jsonl").exists() for name in "ab") and time.monotonic() < until:
        assert process.poll() is None, err.read_text()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 75, err.read_text()
    assert "run the same command again" in err.read_text()
    assert not (out / "later").exists()
    assert not any((out / name / "dpt/report.json").exists() for name in "ab")
    again = cdp(*arguments)
    assert again.code == 0, again.err
    for name in ("a", "b", "later"):
        assert weights(out / name, "dpt") == weights(tmp_path / "whole" / name, "dpt")


def test_students_at_once_are_refused_without_a_sweep_under_a_launcher_and_on_ray(
    tiny: TinyWorld, targets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: object) -> str:
        done = run_here("train-student", "--at-once", 2, *arguments, monkeypatch=monkeypatch, capsys=capsys)
        assert done.code == 2
        return done.err

    sweep = ("--sweep", sweep_file(tmp_path, tiny, targets, "{a: {}, b: {}}"), "--output", tmp_path / "out")
    assert "name its file with --sweep" in refused()
    assert "student a trains on a Ray cluster" in refused(*sweep, "--workers", 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "each of 2 processes of a launcher" in refused(*sweep)
    assert not (tmp_path / "out").exists()
