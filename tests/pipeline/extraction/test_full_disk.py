"""`cdp extract-teacher` on a disk that fills, turns read-only or is closed to this user: a clear error, and a rerun
that finishes the store."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import TinyWorld
from tests.pipeline.processes import Ended, cdp, start_cdp, tree
from tests.processes import PATIENCE_S, runs_until

pytestmark = pytest.mark.slow

LASTING = ("manifest.json", "teacher/", "shards/", "commits/")


def test_a_disk_that_fills_while_it_extracts_is_one_error_that_names_it_and_a_rerun_with_room_finishes(
    tiny: TinyWorld, targets: Path, ray_address: str, small_disk: Path
) -> None:
    store = small_disk / "store"

    def extract() -> Ended:
        places = ("--teacher", tiny.teacher, "--samples", tiny.samples, "--targets", store, "--workers", 1)
        return cdp("extract-teacher", *places, "--ray-address", ray_address, "--set", "teacher.batch_size=4")

    def mount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(small_disk)], check=True)

    room = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes(room.f_bavail * room.f_frsize - 700_000))
    _refused(extract(), store, "No space left on device; free some space there")
    assert _num_commits(store) < _num_commits(targets)
    (small_disk / "filler").unlink()
    mount("size=50m,ro")
    _refused(extract(), store, "nothing can be written in")
    mount("rw")
    finished = extract()
    assert finished.code == 0, finished.err
    assert tree(store, *LASTING) == tree(targets, *LASTING)
    assert not list(store.rglob("*.partial"))


def test_a_permission_lost_while_it_extracts_is_one_error_that_names_the_folder_and_a_rerun_with_it_finishes(
    tiny: TinyWorld, targets: Path, ray_address: str, tmp_path: Path
) -> None:
    store, err = tmp_path / "store", tmp_path / "err.txt"
    places = ("--teacher", tiny.teacher, "--samples", tiny.samples, "--targets", store, "--workers", 1)
    command = ("extract-teacher", *places, "--ray-address", ray_address, "--set", "teacher.batch_size=4")
    driver = start_cdp(*command, err=err)
    assert runs_until(driver, lambda: any((store / "commits").glob("0*.json"))), err.read_text()
    with _unwritable(store, store / "shards", store / "commits"):
        code = driver.wait(PATIENCE_S)
    _refused(Ended(code, "", err.read_text()), store, "give this user access to it")
    assert _num_commits(store) < _num_commits(targets)
    finished = cdp(*command)
    assert finished.code == 0, finished.err
    assert tree(store, *LASTING) == tree(targets, *LASTING)


@contextmanager
def _unwritable(*folders: Path) -> Iterator[None]:
    """Nothing can be made or removed in these folders; by root neither, whom permissions do not hold."""
    as_root = os.geteuid() == 0
    on, off = (["chattr", "+i"], ["chattr", "-i"]) if as_root else (["chmod", "a-w"], ["chmod", "u+w"])
    names = [str(folder) for folder in folders]
    try:
        if subprocess.run([*on, *names], capture_output=True, check=False).returncode:
            pytest.skip("folders cannot be made immutable here, and root may write to any other")
        yield
    finally:
        subprocess.run([*off, *names], check=True)


def _num_commits(store: Path) -> int:
    return len(list((store / "commits").glob("0*.json")))


def _refused(ended: Ended, store: Path, why: str) -> None:
    assert ended.code == 2
    assert "Traceback" not in ended.err
    assert why in ended.err, ended.err
    assert str(store) in ended.err
