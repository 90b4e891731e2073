"""What a group of processes on a Ray cluster tries again, and the folder that all must see."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.cluster import ray_train_group
from stages.student.data.loader import LoaderDied
from storage.errors import CorruptData, StoreUnavailable, UserError
from tests.conftest import TinyWorld
from tests.pipeline.processes import cdp
from tests.pipeline.runs import SETTINGS
from tests.pipeline.test_training_data import keys_of

pytest.importorskip("pandas", reason="the extra ray-train is not installed")
PATIENCE_S = 500
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2 * PATIENCE_S),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.usefixtures("ray_address"),
]


def tries(error: UserError, folder: Path) -> int:
    """How often a group of one process that meets this error each time is started, when two times are allowed."""

    def work(_send: Callable[..., None], _asked: Callable[[], bool]) -> None:
        (folder / f"try-{len(list(folder.glob('try-*')))}").touch()
        raise error

    with pytest.raises(UserError, match=str(error)):
        ray_train_group.run_group(
            work,
            num_workers=1,
            gpus_per_worker=0,
            max_attempts=2,
            storage=str(folder),
            on_message=print,
            should_stop=lambda: False,
        )
    return len(list(folder.glob("try-*")))


def test_a_killed_loader_process_and_a_store_that_does_not_answer_are_tried_again_and_mistakes_are_not(
    tmp_path: Path,
) -> None:
    found = {}
    for error in (LoaderDied("killed"), StoreUnavailable("no answer"), CorruptData("another byte")):
        folder = tmp_path / type(error).__name__
        folder.mkdir()
        found[type(error)] = tries(error, folder)
    assert found == {LoaderDied: 2, StoreUnavailable: 2, CorruptData: 1}


def test_a_run_folder_that_the_processes_of_a_cluster_do_not_see_is_refused_before_any_training(
    tiny: TinyWorld, targets: Path, ray_address: str, tmp_path: Path
) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("a process cannot have mounts of its own here")
    # What the command sees there is its own; the cluster's processes began without it.
    (tmp_path / "runs").mkdir()
    alone = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs tmpfs "{tmp_path}/runs" && exec "$@"', "sh"]
    places = ("--samples", tiny.samples, "--targets", targets, "--student", tiny.student_lm)
    where = ("--output", tmp_path / "runs/run", "--ray-address", ray_address, "--workers", 2, "--stage", "dpt")
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    done = subprocess.run(
        [*alone, sys.executable, "-m", "pipeline.cli", "train-student", *map(str, (*places, *where)), *settings],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 2, done.stderr[-4000:]
    assert f"{tmp_path}/runs/run on " in done.stderr
    assert "is another folder than where the command was given" in done.stderr
    assert not list(tmp_path.glob("runs/run/dpt"))


def test_losses_on_held_out_samples_are_said_where_the_command_was_given(
    tiny: TinyWorld, targets: Path, ray_address: str, tmp_path: Path
) -> None:
    (tmp_path / "held.txt").write_text("\n".join(keys_of(tiny.samples)[:5]))
    # Named as seen from here, which is not where Ray's processes run.
    listed = f"train.validation.subset={os.path.relpath(tmp_path / 'held.txt')}"
    places = ("--samples", tiny.samples, "--targets", targets, "--student", tiny.student_lm)
    where = ("--output", tmp_path / "run", "--ray-address", ray_address, "--workers", 2, "--stage", "dpt")
    settings = [word for setting in (*SETTINGS, listed) for word in ("--set", setting)]
    done = cdp("train-student", *places, *where, *settings)
    assert done.code == 0, done.err[-4000:]
    assert re.search(r"^dpt: validation after step 5: lm .*\(5 held-out samples, ", done.err, re.MULTILINE)
    assert "validation losses at the end of each stage" in done.out
