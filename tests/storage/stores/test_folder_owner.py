"""An output folder has one owner: by real processes that begin together, end, or are killed."""

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from storage.errors import UserError
from storage.stores import folder_owner
from storage.stores.folder_owner import LOCK_FILE, FolderInUse, owned
from tests.processes import kill

HOLDER = """
import os, sys, time
from pathlib import Path
from storage.stores.folder_owner import owned
with owned(Path(sys.argv[1])):
    if "fork" in sys.argv and os.fork() == 0:
        time.sleep(1.5)
        os._exit(0)
    print("owned", flush=True)
    time.sleep(60)
"""

CONTENDER = """
import os, sys, time
from pathlib import Path
from storage.stores.folder_owner import FolderInUse, owned
folder, inside = Path(sys.argv[1]), Path(sys.argv[2])
owned_times = refused = 0
end = time.monotonic() + 0.4
while time.monotonic() < end:
    try:
        with owned(folder):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
            owned_times += 1
            inside.unlink()
    except FolderInUse as error:
        assert "is in use: " in str(error)
        refused += 1
print(owned_times, refused)
"""


def started(script: str, *arguments: object) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@contextmanager
def holder_of(folder: Path, *how: str) -> "Iterator[subprocess.Popen[bytes]]":
    """A process that owns the folder."""
    with started(HOLDER, folder, *how) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"owned\n"
        try:
            yield process
        finally:
            kill(process)


def test_a_second_process_is_refused_and_told_who_owns_the_folder_since_when(tmp_path: Path) -> None:
    with holder_of(tmp_path / "run") as owner:
        found = rf"run is in use: process {owner.pid} on .+ since 20.+; wait until"
        with pytest.raises(FolderInUse, match=found), owned(tmp_path / "run"):
            raise AssertionError


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_a_killed_owner_leaves_the_folder_free_also_while_its_children_live(tmp_path: Path, how: str) -> None:
    with holder_of(tmp_path / "run", how) as owner:
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
        with owned(tmp_path / "run"):
            assert str(os.getpid()) in (tmp_path / "run" / LOCK_FILE).read_text()
    assert list((tmp_path / "run").iterdir()) == []


def test_of_processes_that_contend_for_a_folder_one_is_inside_at_a_time(tmp_path: Path) -> None:
    # Each makes the folder and removes it again.
    contenders = [started(CONTENDER, tmp_path / "a/run", tmp_path / "inside") for _ in range(3)]
    said = [process.communicate(timeout=60) for process in contenders]
    assert [process.returncode for process in contenders] == [0, 0, 0], said
    counts = [tuple(map(int, out.split())) for out, _ in said]
    assert sum(owned_times for owned_times, _ in counts) > 3
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_folder_that_another_process_removes_while_it_is_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir, removed = Path.mkdir, [tmp_path / "a"]

    def made(path: Path, *arguments: object, **options: object) -> None:
        if removed:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(removed.pop()))
        mkdir(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", made)
    with owned(tmp_path / "a/run"):
        assert (tmp_path / "a/run" / LOCK_FILE).is_file()
    assert removed == []


def test_a_folder_that_was_there_stays_and_what_was_put_into_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for name in ("old", "a/new"):
        with owned(tmp_path / name):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    with owned(tmp_path / "a/new"):
        (tmp_path / "a/new/file").touch()
    assert [path.name for path in (tmp_path / "a/new").iterdir()] == ["file"]


def test_where_there_are_no_locks_it_is_said_once_and_work_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def without(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", without)
    folder_owner._say_without_locks.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with owned(tmp_path):
                pass
    (warning,) = caplog.records
    assert "has no locks" in warning.getMessage()
    assert str(tmp_path) in warning.getMessage()


def test_a_lock_file_that_is_something_else_is_refused_and_nothing_is_written_through_it(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("kept")
    lock = tmp_path / "run" / LOCK_FILE
    lock.parent.mkdir()
    for make in (lambda: lock.symlink_to(precious), lambda: os.mkfifo(lock), lock.mkdir):
        make()
        began = time.monotonic()
        with pytest.raises(UserError, match=f"{LOCK_FILE} is no regular file"), owned(lock.parent):
            raise AssertionError
        assert time.monotonic() - began < 1
        lock.rmdir() if lock.is_dir() else lock.unlink()
    assert precious.read_text() == "kept"
    with pytest.raises(UserError, match="is a file or lies below one"), owned(precious / "below"):
        raise AssertionError
