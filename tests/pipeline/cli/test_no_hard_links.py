"""Commands on a file system without hard links: those that need none work, the others say so before any work."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import without_links
from tests.conftest import TinyWorld
from tests.pipeline.processes import tree
from tests.processes import PATIENCE_S

GOLDEN = Path(__file__).parents[2] / "golden" / "released_layout_teacher"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not without_links.SUPPORTED, reason="no seccomp filter for this system"),
]


def cdp(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, without_links.__file__, sys.executable, "-m", "pipeline.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def test_the_filter_refuses_links(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    program = f"import os; os.link({str(tmp_path / 'a')!r}, {str(tmp_path / 'b')!r})"
    done = subprocess.run(
        [sys.executable, without_links.__file__, sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "PermissionError: [Errno 1]" in done.stderr


@pytest.mark.parametrize("command", ["pack-samples", "convert-checkpoint", "export"])
def test_commands_that_write_a_whole_folder_need_no_hard_links(command: str, tiny: TinyWorld, tmp_path: Path) -> None:
    sources = {
        "pack-samples": (tiny.data, tiny.images),
        "convert-checkpoint": (GOLDEN,),
        "export": (tiny.teacher,),
    }[command]
    done = cdp(command, *sources, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "out").iterdir())


def test_a_student_is_trained_and_trained_on_without_hard_links(tiny: TinyWorld, targets: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    places = ("--samples", tiny.samples, "--targets", targets, "--student", tiny.student_lm, "--output", output)
    stages = ("train.dpt={batch_size: 8, epochs: 1}", "train.sft={batch_size: 8, epochs: 1}")
    # Without loader processes: the filter also refuses the link by which the C library makes a semaphore.
    settings = [word for each in (*stages, "train.loader.num_workers=0") for word in ("--set", each)]
    for stage in ("dpt", "sft"):
        done = cdp("train-student", *places, *settings, "--stage", stage)
        assert done.returncode == 0, done.stderr
        assert (output / stage / "student" / "model.safetensors").is_file()


def test_an_extraction_is_refused_before_its_workers_start(tiny: TinyWorld, tmp_path: Path) -> None:
    done = cdp(
        "extract-teacher", "--teacher", tiny.teacher, "--samples", tiny.samples, "--targets", tmp_path / "targets"
    )
    assert done.returncode == 2, done.stderr
    assert f"the file system of {tmp_path / 'targets'} refused a hard link" in done.stderr
    assert "use a folder on another file system, or an object store" in done.stderr
    assert not any(path.is_file() for path in (tmp_path / "targets").rglob("*"))


def test_a_repair_is_refused_before_anything_is_moved(targets: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(targets, tmp_path / "store"))
    next(store.glob("shards/*/zarr.json")).unlink()
    before = tree(store)
    done = cdp("verify", store, "--repair")
    assert done.returncode == 2, done.stderr
    assert "refused a hard link" in done.stderr
    assert tree(store) == before
