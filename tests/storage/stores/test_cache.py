"""The cache of object stores stays within its bound, and never takes what is in use."""

import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from storage.errors import UserError
from storage.stores import Store, open_store
from storage.stores.cache import cache_limit_bytes, cached

ENTRY_BYTES = 1000


class Reader:
    """Who holds an entry."""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with room for two and a half entries."""
    monkeypatch.setenv("CDP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CDP_CACHE_GB", str(2.5 * ENTRY_BYTES / 1e9))
    return tmp_path / "cache"


def entry(number: int, holder: object | None) -> Path:
    def fill(folder: Path) -> None:
        (folder / "file").write_bytes(bytes([number]) * ENTRY_BYTES)

    return cached(f"{number:032x}", ENTRY_BYTES, fill, holder)


def kept(cache: Path) -> set[int]:
    return {int(path.name, 16) for path in cache.iterdir() if path.is_dir() and len(path.name) == 32}


def test_the_entry_used_longest_ago_goes_first(cache):
    for number in (1, 2, 1, 3):
        assert (entry(number, Reader()) / "file").read_bytes() == bytes([number]) * ENTRY_BYTES
    assert kept(cache) == {1, 3}
    assert (entry(2, Reader()) / "file").stat().st_size == ENTRY_BYTES
    assert kept(cache) == {2, 3}


def test_what_this_process_holds_stays_even_above_the_bound_and_goes_when_it_is_let_go(cache):
    readers = [Reader() for _ in range(4)]
    for number, reader in enumerate(readers):
        entry(number, reader)
    assert kept(cache) == {0, 1, 2, 3}
    readers.clear()
    del reader
    entry(9, Reader())
    assert kept(cache) == {3, 9}


def test_what_is_held_to_the_end_of_the_process_stays_also_after_the_cache_was_emptied(cache):
    entry(1, None)
    shutil.rmtree(cache)
    entry(1, None)
    for number in (2, 3, 4):
        entry(number, Reader())
    assert kept(cache) == {1, 4}


def _hold(ready: "multiprocessing.synchronize.Event", done: "multiprocessing.synchronize.Event") -> None:
    entry(1, None)
    ready.set()
    done.wait(60)


def test_what_another_process_holds_stays(cache):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(ready, done))
    other.start()
    assert ready.wait(60)
    for number in (2, 3, 4):
        entry(number, Reader())
    assert kept(cache) == {1, 4}
    done.set()
    other.join(60)
    for number in (5, 6):
        entry(number, Reader())
    assert kept(cache) == {5, 6}


_MANY = """
import sys
from pathlib import Path
from tests.storage.stores.test_cache import Reader, ENTRY_BYTES, entry
for turn in range(60):
    number = (turn * int(sys.argv[1])) % 7
    reader = Reader()
    assert (entry(number, reader) / "file").read_bytes() == bytes([number]) * ENTRY_BYTES
"""


def test_processes_that_fill_and_evict_at_once_read_what_they_asked_for(cache):
    workers = [subprocess.Popen([sys.executable, "-c", _MANY, str(step)]) for step in (1, 2, 3)]
    assert [worker.wait(120) for worker in workers] == [0, 0, 0]
    assert len(kept(cache)) <= 5
    entry(8, Reader())
    assert len(kept(cache)) <= 2
    assert list(cache.glob("*.partial")) == []


def test_a_failed_download_takes_no_room(cache):
    def fail(folder: Path) -> None:
        (folder / "file").write_bytes(b"half")
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        cached("f" * 32, ENTRY_BYTES, fail, Reader())
    for number in (1, 2):
        entry(number, Reader())
    assert kept(cache) == {1, 2}


@pytest.mark.parametrize("text", ["0", "-1", "much", "inf", "nan"])
def test_a_bound_that_is_no_size_is_refused(monkeypatch, text):
    monkeypatch.setenv("CDP_CACHE_GB", text)
    with pytest.raises(UserError, match="CDP_CACHE_GB"):
        cache_limit_bytes()


def test_reading_through_a_store_keeps_the_bound(cache):
    store: Store = open_store("memory://bounded")
    for number in range(6):
        store.write(f"file{number}", bytes([number]) * ENTRY_BYTES)
        assert store.local(f"file{number}", holder=Reader()).read_bytes() == bytes([number]) * ENTRY_BYTES
    assert len(kept(cache)) == 2


def test_a_clock_that_went_backwards_evicts_in_another_order_and_keeps_the_bound(cache: Path) -> None:
    for number in (1, 2, 3, 4):
        entry(number, Reader())
        for lock in cache.glob("*.lock"):
            os.utime(lock, (4e9 - number, 4e9 - number))
    assert len(kept(cache)) == 2
