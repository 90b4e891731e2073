"""Losses on held-out samples, as the command and a sweep say them."""

import re
from pathlib import Path

import pytest
import torch

from pipeline.sweep import SweepReport, SweptStudent, sweep_table
from stages.student.run_folder import StageFolder, ValidationReport
from tests.conftest import TinyWorld
from tests.pipeline.processes import run_here
from tests.pipeline.runs import SETTINGS
from tests.pipeline.test_sweep import finished


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_job_log_has_a_line_for_each_measurement_and_the_command_ends_with_a_table(
    precision: str,
    tiny: TinyWorld,
    targets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.set_num_threads(1)
    places = ("--samples", tiny.samples, "--targets", targets, "--student", tiny.student_lm, "--output", tmp_path)
    settings = [*SETTINGS, "train.validation={share: 0.3, every: 2}", "train.dpt={batch_size: 4, max_steps: 3}"]
    settings.append(f"train.parallel.precision={precision}")
    words = (word for setting in settings for word in ("--set", setting))
    done = run_here("train-student", "--stage", "dpt", *places, *words, monkeypatch=monkeypatch, capsys=capsys)
    assert done.code == 0, done.err
    said = re.findall(
        r"dpt: validation after step (\d): lm [\d.]+, kd [\d.]+, in all [\d.]+ \((\d+) held-out", done.err
    )
    found = StageFolder(tmp_path / "dpt").report().validation
    assert found is not None
    assert said == [("2", str(found.samples)), ("3", str(found.samples))]
    assert "validation losses at the end of each stage" in " ".join(done.out.split())
    assert f"{found.losses['kd']:.3f}" in done.out


def test_a_sweep_shows_validation_losses_beside_those_of_training_where_there_are_any() -> None:
    held_out = ValidationReport(samples=3, losses={"loss": 1.5, "lm": 1.25}, time_share=0.1)
    students = {
        "with": SweptStudent(stages={"dpt": finished("a").model_copy(update={"validation": held_out})}),
        "without": SweptStudent(stages={"dpt": finished("b")}),
    }
    table = sweep_table(SweepReport(students=students, failures={}))
    assert table.header == ["student", "last stage", "lm", "validation lm", "seconds", "samples/s"]
    assert [row[2:4] for row in table.rows] == [["1.000", "1.250"], ["1.000", ""]]
    assert "validation losses those at its end" in table.title
