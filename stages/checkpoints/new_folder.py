"""A new folder that appears complete or not at all, for commands that write a whole checkpoint."""

import glob
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.errors import UserError, disk_errors_named
from storage.regular_files import refuse_unusable
from storage.stores import PARTIAL, LocalStore
from storage.stores.owner import names_owner, remove_if_abandoned


def check_new(folder: Path) -> None:
    """Refuses a folder that holds something.

    Raises:
        UserError: If it does, is a file, or is not UTF-8.
    """
    refuse_unusable(folder)
    # `exists` says no for what lies below a file.
    if any(above.is_file() for above in folder.absolute().parents):
        raise UserError(f"{folder} leads through a file; name a new folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} holds something already; name a new folder")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `folder` when the block ends, and is gone when it raises.

    What a killed run left of it is removed first; what another process is writing is left alone.

    Raises:
        UserError: If `folder` holds something, or the disk is full.
    """
    folder = folder.absolute()
    check_new(folder)
    for left in folder.parent.glob(f"{glob.escape(folder.name)}.*{PARTIAL}"):
        if names_owner(left):
            remove_if_abandoned(left)
    store = LocalStore(folder.parent)
    staging = store.staging(folder.name)
    try:
        with disk_errors_named(folder):
            yield staging
        check_new(folder)
        # Another process may have been quicker since.
        store.put_tree(staging, folder.name, replace=False)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
