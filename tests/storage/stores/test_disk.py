"""A full disk or a lost permission is a clear error that names the path; a rerun finishes to the same bytes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from storage.errors import StoreUnavailable
from storage.stores import open_store
from storage.targets.cleaning import clean_partials
from storage.targets.manifest import create_or_check
from storage.targets.shard_writer import write_shard
from storage.targets.store import TargetStore
from tests.storage.builders import files_of, manifest, shard_content

KEYS = [f"k{number}" for number in range(12)]


def write(folder: Path) -> None:
    made_for = manifest()
    store = open_store(folder)
    create_or_check(store, made_for)
    samples, maps = shard_content(made_for, KEYS, sizes=(40,))
    write_shard(store, 0, made_for, "samples-000000.tar", samples, maps, [])


def test_a_disk_that_fills_at_any_point_leaves_no_shard_and_a_rerun_gives_the_same_bytes(small_disk, tmp_path):
    write(tmp_path / "whole")
    expected = files_of(tmp_path / "whole")
    store = small_disk / "store"
    create_or_check(open_store(store), manifest())
    filler = small_disk / "filler"
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    failed = 0
    for room in range(0, 200_000, 12_288):
        filler.write_bytes(bytes(free - room))
        said = ""
        try:
            write(store)
        except StoreUnavailable as error:
            said = str(error)
        filler.unlink()
        if not said:
            break
        failed += 1
        assert "No space left on device; free some space there" in said
        assert str(small_disk) in said
        assert TargetStore.open(store).commits == {}
    assert failed > 3
    clean_partials(open_store(store))
    write(store)
    assert files_of(store) == expected


def test_a_mount_that_turns_read_only_is_named(small_disk):
    store = small_disk / "store"
    create_or_check(open_store(store), manifest())
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StoreUnavailable, match=rf"{small_disk}.*Read-only file system; mount it writable"):
        write(store)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    write(store)
    assert list(TargetStore.open(store).commits) == [0]


_AS_NOBODY = """
import os, sys
from pathlib import Path
from storage.errors import StoreUnavailable
from tests.storage.stores.test_disk import write
import zarr, torch
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
try:
    write(Path(sys.argv[1]))
except StoreUnavailable as error:
    print(error)
"""


def test_a_folder_without_permission_is_named(tmp_path):
    store = tmp_path / "store"
    create_or_check(open_store(store), manifest())
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    store.chmod(0o555)
    command = [sys.executable, "-c", _AS_NOBODY, str(store)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    store.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert str(store) in done.stdout
    assert "Permission denied; give this user access to it" in done.stdout
    write(store)
    assert list(TargetStore.open(store).commits) == [0]
