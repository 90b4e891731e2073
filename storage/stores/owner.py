"""Whose work in progress a `.partial` is, and whether that process may still be at it."""

import os
import re
import shutil
import socket
import time
import uuid
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path

from storage.stores.base import PARTIAL

STALE_S = 24 * 3600
"""Age of its newest file after which a `.partial` of another machine, or of nobody known, counts as abandoned: a
writer adds to its own every few seconds. On this machine the owner is looked up instead."""

_OWNED = re.compile(
    rf"\.[A-Za-z0-9-]+_(?P<machine>[0-9a-f]{{12}})_(?P<pid>[0-9]+)_(?P<start>[0-9]+)_[0-9a-f]{{12}}{PARTIAL}"
)


def partial_path(target: Path) -> Path:
    """A new name beside `target` that says who is writing: host, machine, process number, its start.

    Unique, because two threads may write one target; the name never becomes part of what is stored.
    """
    host, pid = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:32] or "host", os.getpid()
    owner = f"{host}_{_machine()}_{pid}_{_start_of(pid) or 0}_{uuid.uuid4().hex[:12]}"
    return target.with_name(f"{target.name}.{owner}{PARTIAL}")


def names_owner(path: Path) -> bool:
    """Whether the name is one of `partial_path`, which no user gives a folder by chance."""
    return _OWNED.search(path.name) is not None


def remove_if_abandoned(path: Path) -> bool:
    """Remove a `.partial` file or folder whose owner is dead, or unknown and silent for `STALE_S`.

    Of several cleaners one gets True.
    """
    owned = _OWNED.search(path.name)
    try:
        if owned and owned["machine"] == _machine():
            in_work = _runs(int(owned["pid"]), int(owned["start"]))
        else:
            newest = max(each.lstat().st_mtime for each in (path, *path.rglob("*")))
            in_work = time.time() - newest <= STALE_S
        if in_work:
            return False
        # Renamed first: of two cleaners one succeeds, and what is left of a killed one has a known owner again.
        doomed = path.rename(partial_path(path.with_name("abandoned")))
    except FileNotFoundError:
        return False
    if doomed.is_dir() and not doomed.is_symlink():
        shutil.rmtree(doomed)
    else:
        doomed.unlink()
    return True


@cache
def _machine() -> str:
    """Of this boot and this set of process numbers: a container sees other processes than its host."""
    parts = [socket.gethostname()]
    # Without Linux the host name has to do, and process numbers alone say who runs.
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return sha256("\n".join(parts).encode()).hexdigest()[:12]


def _runs(pid: int, start: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it runs as another user
    found = _start_of(pid)
    return found is None or found == start


def _start_of(pid: int) -> int | None:
    """When the process was started, in ticks since boot; 0 once only its entry is left, None if unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return 0 if fields[0] in "ZX" else int(fields[19])
