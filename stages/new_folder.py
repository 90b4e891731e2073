"""A new folder that appears complete or not at all, for commands that write a whole checkpoint."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.errors import UserError
from storage.stores import open_store


def check_new(folder: Path) -> None:
    """Refuses a folder that holds something.

    Raises:
        UserError: it does, or it is a file.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} holds something already; name a new folder")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A place to write to, which becomes `folder` when the block ends, and is gone when it raises.

    What a killed run left of it is removed first.

    Raises:
        UserError: `folder` holds something.
    """
    folder = folder.absolute()
    check_new(folder)
    staging = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        check_new(folder)
        open_store(folder.parent).put_tree(staging, folder.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
