"""The one owner of an output folder: a process that holds a lock on a file in it, until it ends or dies."""

import errno
import fcntl
import json
import logging
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from storage.errors import PassingFailure, UserError, disk_errors_named
from storage.regular_files import refuse_unusable

logger = logging.getLogger(__name__)

LOCK_FILE = "owner.lock"
"""Says who works in the folder. One without a lock on it was left by a process that was killed, and hinders nobody."""

_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
# A link would have what it points to overwritten, and a FIFO would wait.
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK


class FolderInUse(PassingFailure):
    """Another process works in an output folder."""


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Keeps the folder for this process until the block ends. It is made if need be, and removed again if left empty.

    Several processes that work together have one owner: one of them calls this. It is not for two threads of a process.

    On a network file system the lock is seen by other machines if that passes locks on. Where a file system has none, a
    warning says so and the block runs.

    Raises:
        FolderInUse: If another process has it; says which, where and since when.
        UserError: If it cannot be a folder, its path is not UTF-8, or something else has the name of the lock's file.
    """
    refuse_unusable(folder)
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    lock = folder / LOCK_FILE
    with disk_errors_named(lock):
        descriptor = _locked(lock)
    try:
        yield
    finally:
        # While it is locked, so that it is not another's.
        lock.unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):
            for each in made:
                each.rmdir()


def _locked(lock: Path) -> int:
    """The open file, locked and saying who this is."""
    while True:
        descriptor = _opened(lock)
        if descriptor is None:
            continue
        try:
            _lock(descriptor, lock)
            # An owner that ended may have removed it meanwhile.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), lock.stat()):
                    now = datetime.now(UTC).isoformat(" ", "seconds")
                    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": now}
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, json.dumps(owner).encode(), 0)
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _opened(lock: Path) -> int | None:
    """None if its folder was removed meanwhile, by an owner that had made it."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        # It was there when it was to be made, and was removed before it was looked at.
        if isinstance(error, FileExistsError) and not os.path.lexists(error.filename):
            return None
        raise UserError(f"{lock.parent} is a file or lies below one; name a folder") from error
    try:
        descriptor = os.open(lock, _FLAGS, 0o644)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise UserError(f"{lock} is no regular file; remove it") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{lock} is no regular file; remove it")
    return descriptor


def _lock(descriptor: int, lock: Path) -> None:
    try:
        # Not flock: children that outlive a killed owner would hold it on.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _WITHOUT_LOCKS:
            _say_without_locks(lock.parent, str(error))
        elif error.errno in (errno.EAGAIN, errno.EACCES):
            raise FolderInUse(
                f"{lock.parent} is in use: {_owner(descriptor)}; wait until that ends, stop it, or name another folder"
            ) from None
        else:
            raise


def _owner(descriptor: int) -> str:
    """Who has the lock, by what the file says."""
    for _ in range(10):
        # It is written as soon as it is locked.
        with suppress(ValueError, KeyError, TypeError):
            said = json.loads(os.pread(descriptor, 1000, 0))
            return f"process {said['pid']} on {said['host']} works in it since {said['since']}"
        time.sleep(0.02)
    return "another process works in it"


@cache
def _say_without_locks(folder: Path, reason: str) -> None:
    logger.warning("%s: its file system has no locks (%s); start no second command on this folder", folder, reason)
