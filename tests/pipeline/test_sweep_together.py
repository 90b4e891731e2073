"""Several students by one command under torchrun: all are trained, and a failure in one process loses nothing."""

import json
import time
from pathlib import Path

import pytest

from pipeline.sweep import SweepReport
from tests.conftest import TinyWorld
from tests.pipeline.processes import tree
from tests.pipeline.runs import dealt
from tests.pipeline.test_distributed import (
    ONE,
    PATIENCE_S,
    TORCHRUN,
    assert_same_stage,
    broken_launcher,
    said,
    train_student,
)
from tests.pipeline.test_sweep import write
from tests.pipeline.test_training_data import keys_of
from tests.pipeline.training_kills import weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * PATIENCE_S)]

TRAIN = """\
train:
  loader: {microbatch_size: 1, num_workers: 0}
  parallel: {precision: fp32}
  logging: {every: 1}
  checkpoint: {every: 1}
  dpt: {batch_size: 2, max_steps: 8}
"""


def sweep_file(folder: Path, tiny: TinyWorld, targets: Path, text: str) -> Path:
    places = f"samples: {tiny.samples}\ntargets: {targets}\nstudent: {tiny.student_lm}\n"
    return write(folder / "sweep.yaml", places + TRAIN + text)


def saved(output: Path) -> SweepReport:
    return SweepReport.model_validate_json((output / "sweep.json").read_text())


def test_students_are_trained_and_compared_as_by_one_process(tiny: TinyWorld, targets: Path, tmp_path: Path) -> None:
    text = (
        f"compare: {{suites: {{sugarcrepe: {{data: {tiny.pairs}, limit: 2}}}}, similarity_samples: 4}}\n"
        "students: {both: {}, words: {train.dpt.kd_weight: 0}}\n"
    )
    sweep = sweep_file(tmp_path, tiny, targets, text)
    found = {}
    for name, launcher in (("one", ONE), ("two", TORCHRUN)):
        done = train_student(launcher, "--sweep", sweep, "--output", tmp_path / name, "--stage", "dpt")
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout.count("students side by side") == 1
        found[name] = saved(tmp_path / name)
    one, two = found["one"], found["two"]
    assert list(two.students) == ["both", "words"]
    for name, student in two.students.items():
        assert_same_stage(tmp_path / "two" / name / "dpt", tmp_path / "one" / name / "dpt")
        expected = one.students[name]
        assert student.suites["sugarcrepe"].metrics == expected.suites["sugarcrepe"].metrics
        assert student.similarity is not None
        assert expected.similarity is not None
        assert student.similarity.mean == pytest.approx(expected.similarity.mean, rel=1e-3)


def test_a_student_that_fails_in_one_process_ends_all_and_the_same_command_goes_on(
    tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    # Of the fifth step, in the process that writes nothing.
    (sample,) = dealt(tiny.samples, targets, 2, rank=1)[4]
    others = [key for key in keys_of(tiny.samples) if key != sample.key]
    write(tmp_path / "others.txt", "\n".join(others))
    students = f"students: {{spared: {{train.data.subset: {tmp_path / 'others.txt'}}}, hit: {{}}, unhurt: {{}}}}\n"
    sweep, output = sweep_file(tmp_path, tiny, targets, students), tmp_path / "out"
    arguments = ("--sweep", sweep, "--output", output, "--stage", "dpt")
    begun = time.monotonic()
    done = train_student(broken_launcher(tmp_path / "logs", sample.key, "error"), *arguments)
    assert done.returncode != 0
    assert time.monotonic() - begun < 240
    heard = said(tmp_path / "logs")
    assert heard.keys() == {"0", "1"}
    assert "RuntimeError: no kernel image is available" in heard["1"]
    assert "RuntimeError" in heard["0"]
    assert list(saved(output).students) == ["spared"]
    assert not (output / "unhurt").exists()

    before = tree(output / "spared/dpt")
    done = train_student(TORCHRUN, *arguments)
    assert done.returncode == 0, done.stderr[-4000:]
    assert list(saved(output).students) == ["spared", "hit", "unhurt"]
    assert not saved(output).failures
    lines = [json.loads(line) for line in (output / "hit/dpt/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert weights(output / "hit", "dpt") == weights(output / "unhurt", "dpt")
    assert weights(output / "spared", "dpt") != weights(output / "hit", "dpt")
    assert tree(output / "spared/dpt") == before
