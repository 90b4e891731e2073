"""Processes that train together on machines which do not share the run folder: all say so, none waits for another."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

from pipeline.training import train
from tests.conftest import TinyWorld
from tests.pipeline.runs import SETTINGS, run_file
from tests.pipeline.test_distributed import PATIENCE_S, TORCHRUN
from tests.pipeline.test_training import Stopped, stop_at

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE_S)]


def what_both_say(tiny: TinyWorld, targets: Path, output: Path, other: Path, stage: str, logs: Path) -> list[str]:
    """What two processes with folders of their own say at their end, which comes soon."""
    module = TORCHRUN.index("-m", 2)
    launcher = [*TORCHRUN[:module], "--log-dir", str(logs), "--redirects", "2", "-m", "tests.pipeline.two_folders"]
    places = ("--samples", tiny.samples, "--targets", targets, "--student", tiny.student_lm, "--output", output)
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    begun = time.monotonic()
    done = subprocess.run(
        [*launcher, str(other), "train-student", *map(str, places), "--stage", stage, *settings],
        env={**os.environ, "MASTER_ADDR": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode != 0
    # Gloo gives up on a process that waits in vain only after half an hour.
    assert time.monotonic() - begun < 240
    said = [path.read_text() for path in sorted(logs.glob("*/attempt_0/*/stderr.log"))]
    assert len(said) == 2
    return said


@pytest.fixture
def dpt(undisturbed: Path, tmp_path: Path) -> Path:
    """A run folder in which the first stage is finished."""
    shutil.copytree(undisturbed / "dpt", tmp_path / "run" / "dpt")
    return tmp_path / "run"


def assert_both_say(said: list[str], first: str, second: str) -> None:
    for text in said:
        found = re.search(
            r"do not see the same run folder; process 0 sees in (.*); process 1 sees in (.*)\. Name", text
        )
        assert found, text
        assert re.search(first, found[1])
        assert re.search(second, found[2])
        assert "Traceback" not in text


def test_a_new_run_in_two_folders_is_ended_before_its_first_step(
    tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    said = what_both_say(tiny, targets, tmp_path / "run", tmp_path / "other", "dpt", tmp_path / "logs")
    assert_both_say(
        said, rf"^{tmp_path}/run/dpt on \S+: stage.json \w{{12}}$", r"^\S+/other/dpt on \S+: .*json missing$"
    )
    assert not (tmp_path / "run/dpt/metrics.jsonl").exists()
    assert not (tmp_path / "other").exists()


def test_a_student_to_start_from_that_one_process_does_not_see_is_said_by_both(
    tiny: TinyWorld, targets: Path, dpt: Path, tmp_path: Path
) -> None:
    shutil.copytree(dpt / "dpt", tmp_path / "other" / "dpt", ignore=shutil.ignore_patterns("report.json"))
    said = what_both_say(tiny, targets, dpt, tmp_path / "other", "dft", tmp_path / "logs")
    assert_both_say(said, r"start \S+/dpt/student \(\w{12}\)", "start the decoder")
    assert not (dpt / "dft" / "metrics.jsonl").exists()


@pytest.mark.parametrize("damaged", [False, True], ids=["missing", "damaged"])
def test_a_checkpoint_that_one_process_does_not_see_or_sees_damaged_is_said_by_both(
    damaged: bool, tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    with pytest.raises(Stopped):
        train(run_file(tiny, targets, tmp_path / "run", "train.checkpoint.every=1"), ["dpt"], stop_at("dpt", 4))
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    checkpoint = tmp_path / "other/dpt/checkpoints/step-00000003"
    if damaged:
        (checkpoint / "trained.safetensors").unlink()
    else:
        shutil.rmtree(checkpoint)
    said = what_both_say(tiny, targets, tmp_path / "run", tmp_path / "other", "dpt", tmp_path / "logs")
    if damaged:
        assert_both_say(said, "whole checkpoint of step 3", "whole checkpoint of step 2")
    else:
        assert_both_say(said, "newest checkpoint step-00000003", "newest checkpoint step-00000002")
