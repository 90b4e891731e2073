"""The memory in which loader processes hand batches over: how much there is, and whether it is enough."""

import os
from pathlib import Path

from storage.errors import UserError

FOLDER = Path("/dev/shm")  # noqa: S108, it is where Linux has shared memory
TO_DO = (
    "give the run more memory, or more shared memory (docker: --shm-size or --ipc=host), or set "
    "train.loader.num_workers or train.loader.prefetch lower"
)


def shared_memory() -> str:
    """What there is of it, for an error."""
    try:
        found = os.statvfs(FOLDER)
    except OSError as error:
        return f"{FOLDER}, the shared memory, cannot be used ({error.strerror})"
    total, free = (found.f_frsize * blocks / 2**20 for blocks in (found.f_blocks, found.f_bavail))
    read_only = ", and is mounted read-only" if found.f_flag & os.ST_RDONLY else ""
    return f"{FOLDER}, the shared memory, has {total:,.0f} MiB, {free:,.0f} MiB of them free{read_only}"


def check_room(batch_bytes: int, num_batches: int) -> None:
    """Refuses to begin where the batches that are ready at one time do not fit.

    Raises:
        UserError: If so many batches of this size are larger than all shared memory.
    """
    if not FOLDER.is_dir():
        return
    found = os.statvfs(FOLDER)
    if (needed := batch_bytes * num_batches) > found.f_frsize * found.f_blocks:
        raise UserError(
            f"{num_batches} batches of {batch_bytes / 2**20:,.0f} MiB that are ready at one time need "
            f"{needed / 2**20:,.0f} MiB; {shared_memory()}; {TO_DO}"
        )
