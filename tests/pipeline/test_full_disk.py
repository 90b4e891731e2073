"""`cdp extract-teacher` on a disk that fills or turns read-only: a clear error, and a rerun that finishes the store."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import TinyWorld
from tests.pipeline.processes import Ended, cdp, tree

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
    assert not list((store / "commits").glob("000006.json"))
    (small_disk / "filler").unlink()
    mount("size=50m,ro")
    _refused(extract(), store, "Read-only file system; mount it writable")
    mount("rw")
    finished = extract()
    assert finished.code == 0, finished.err
    assert tree(store, *LASTING) == tree(targets, *LASTING)
    assert not list(store.rglob("*.partial"))


def _refused(ended: Ended, store: Path, why: str) -> None:
    assert ended.code == 2
    assert "Traceback" not in ended.err
    assert why in ended.err, ended.err
    assert str(store) in ended.err
