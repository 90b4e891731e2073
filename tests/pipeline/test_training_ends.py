"""The end of a stage: its student is saved though that fails at first, its report is the same whatever was resumed."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.runtime.interruption import Interrupted
from pipeline.training import train
from stages.student.run_folder import StageFolder, StageReport
from storage.errors import StoreUnavailable
from tests.conftest import TinyWorld
from tests.pipeline.processes import tree
from tests.pipeline.runs import run_file
from tests.pipeline.steps import AtEachStep

LONG = ("train.dpt={batch_size: 4, epochs: 4}", "train.logging.every=7", "train.checkpoint.every=50")
"""24 steps, of which the report is about the last two."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_where_the_disk_is_full_when_the_student_is_saved_a_rerun_trains_no_step_again(
    tiny: TinyWorld, targets: Path, undisturbed: Path, tmp_path: Path, small_disk: Path
) -> None:
    output, last = small_disk / "run", "step-00000005"
    # As much as the last checkpoint takes, and a part of a student.
    needed = sum(file.stat().st_size for file in (undisturbed / "dpt/checkpoints" / last).iterdir()) + 2**16
    assert needed < (undisturbed / "dpt/student/model.safetensors").stat().st_size

    def fill(_: str, step: int) -> None:
        if step == 5:
            room = os.statvfs(small_disk)
            (small_disk / "filler").write_bytes(bytes(room.f_bavail * room.f_frsize - needed))

    with pytest.raises(StoreUnavailable, match=r"run/dpt/student.*: No space left on device; free some space"):
        train(run_file(tiny, targets, output), ["dpt"], AtEachStep(fill))
    assert (output / "dpt/checkpoints" / last).is_dir()
    assert not (output / "dpt/report.json").exists()
    (small_disk / "filler").unlink()
    shutil.move(output, tmp_path / "roomier")
    steps: list[object] = []
    (report,) = train(
        run_file(tiny, targets, tmp_path / "roomier"), ["dpt"], AtEachStep(lambda *step: steps.append(step))
    )
    assert steps == []
    assert tree(tmp_path / "roomier/dpt/student") == tree(undisturbed / "dpt/student")
    expected = StageFolder(undisturbed / "dpt").report()
    assert (report.steps, report.samples, report.losses) == (expected.steps, expected.samples, expected.losses)


@pytest.fixture(scope="module")
def in_one_go(tiny: TinyWorld, targets: Path, tmp_path_factory: pytest.TempPathFactory) -> StageReport:
    torch.set_num_threads(1)
    (report,) = train(run_file(tiny, targets, tmp_path_factory.mktemp("long") / "run", *LONG), ["dpt"])
    assert report.steps == 24
    return report


@pytest.mark.parametrize("step", [3, 22, 23], ids=["long-before", "just-before", "within"])
def test_the_losses_of_a_report_are_those_of_an_undisturbed_run_wherever_the_stage_was_stopped(
    step: int, tiny: TinyWorld, targets: Path, in_one_go: StageReport, tmp_path: Path
) -> None:
    run, done = run_file(tiny, targets, tmp_path / "run", *LONG), list[int]()
    with pytest.raises(Interrupted):
        train(run, ["dpt"], AtEachStep(lambda _, step: done.append(step)), lambda: len(done) == step)
    (report,) = train(run, ["dpt"])
    assert report.losses == in_one_go.losses
    assert report.losses.keys() == {"loss", "lm", "kd"}
