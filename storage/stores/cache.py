"""This machine's bounded cache of what object stores hold: whole entries, the least recently used evicted first."""

import fcntl
import os
import re
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.errors import UserError, disk_errors_named
from storage.regular_files import home_expanded
from storage.stores.base import PARTIAL
from storage.stores.owner import partial_path, remove_if_abandoned

DEFAULT_CACHE_GB = 100.0
"""Most of the cache folder in GB (10^9 bytes) unless `CDP_CACHE_GB` says otherwise."""

_LOCK_NAME = re.compile(r"[0-9a-f]{32}\.lock")


def cache_dir() -> Path:
    """`CDP_CACHE_DIR`, by default `~/.cache/compodistill`."""
    return home_expanded(os.environ.get("CDP_CACHE_DIR", "~/.cache/compodistill"))


def cache_limit_bytes() -> int:
    """What `CDP_CACHE_GB` allows.

    Raises:
        UserError: If it is no positive number.
    """
    text = os.environ.get("CDP_CACHE_GB", str(DEFAULT_CACHE_GB))
    try:
        limit = float(text) * 1e9
    except ValueError:
        limit = -1.0
    if not 0 < limit < float("inf"):
        raise UserError(f"CDP_CACHE_GB is {text!r}, expected the cache's most GB as a positive number, such as 50")
    return int(limit)


def cached(key: str, num_bytes: int, fill: Callable[[Path], None], holder: object | None) -> Path:
    """The folder of entry `key`, filled by one process of this machine if it is not there.

    Entries in use by any process are never evicted; if those alone exceed the limit, the cache is larger than it.

    Args:
        key: 32 hex digits that change with the content.
        num_bytes: What `fill` will write.
        fill: Writes the content to a new folder; if it raises, nothing is kept.
        holder: In use as long as this object lives; None is as long as the process runs.
    """
    folder = cache_dir()
    with disk_errors_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        entry = folder / key
        pin = _pinned(entry, holder)
        if entry.is_dir():
            return entry
        with locked(folder / f"{key}.fill"):
            if entry.is_dir():
                return entry
            os.truncate(pin, 0)
            os.pwrite(pin, str(num_bytes).encode(), 0)
            _make_room(folder)
            partial = partial_path(entry)
            try:
                partial.mkdir()
                fill(partial)
                partial.rename(entry)
            except BaseException:
                os.truncate(pin, 0)
                raise
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return entry


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file."""
    descriptor = _locked_file(path, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


_kept: dict[Path, int] = {}
"""Open lock files of the entries that this process uses until it ends."""


def _pinned(entry: Path, holder: object | None) -> int:
    """Mark an entry as used now, and hold a shared lock as long as the holder lives; the open lock file."""
    descriptor = _locked_file(entry.with_name(f"{entry.name}.lock"), fcntl.LOCK_SH)
    os.utime(descriptor)
    if holder is not None:
        # A forked child closes its own copy: the lock stays until its parent's is closed too.
        weakref.finalize(holder, os.close, descriptor)
    elif entry in _kept and os.path.samestat(os.fstat(_kept[entry]), os.fstat(descriptor)):
        os.close(descriptor)
    else:
        # The first pin, or the cache folder was emptied since: the lock that counts is that of the new file.
        _kept[entry] = descriptor
    return _kept[entry] if holder is None else descriptor


def _make_room(folder: Path) -> None:
    """Evict what was used longest ago, and nobody uses, until the entries fit into the limit."""
    limit = cache_limit_bytes()
    with locked(folder / "evict.lock"):
        for partial in folder.glob(f"*{PARTIAL}"):
            remove_if_abandoned(partial)
        locks = [lock for lock in folder.glob("*.lock") if _LOCK_NAME.fullmatch(lock.name)]
        num_bytes = {lock: _entry_bytes(lock) for lock in locks}
        total = sum(num_bytes.values())
        # What a killed download left comes first.
        for lock in sorted(locks, key=lambda lock: (lock.with_suffix("").is_dir(), lock.stat().st_mtime_ns)):
            if total <= limit:
                return
            if _evicted(lock):
                total -= num_bytes[lock]


def _entry_bytes(lock: Path) -> int:
    """What its lock file says, which is written before the entry."""
    text = lock.read_bytes()
    if text.isdigit():
        return int(text)
    return sum(file.stat().st_size for file in lock.with_suffix("").rglob("*") if file.is_file())


def _evicted(lock: Path) -> bool:
    """Remove an entry unless some process uses it."""
    descriptor = os.open(lock, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        entry = lock.with_suffix("")
        if entry.is_dir():
            # Renamed first, so that a kill leaves no half of it under its name.
            shutil.rmtree(entry.rename(partial_path(entry)))
        lock.with_suffix(".fill").unlink(missing_ok=True)
        lock.unlink()
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _locked_file(path: Path, how: int) -> int:
    """An open, locked file that still has this name: an evicted entry's lock file is removed under its waiters."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(descriptor, how)
        try:
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)
