"""Opens and reads files that somebody named: regular ones alone, and no more bytes than their reader allows.

A folder of a stranger may hold a FIFO, whose reader waits for ever, or a link to a device, which never ends.
"""

import errno
import os
import re
import stat
from contextlib import suppress
from io import BufferedReader
from pathlib import Path

from storage.errors import CorruptData, UserError, disk_errors_named

MAX_PARTS = 255
"""Folders that a path may lead through: they are made one inside the other."""
MAX_BYTES = 64 * 2**20
"""Most bytes of a file that is read whole, unless its reader says otherwise. Records and reports have kilobytes; one of
a hundred thousand skipped samples is smaller."""

_URL = re.compile("[A-Za-z][A-Za-z0-9+.-]+:/[^/]")
"""What a URL looks like as a path, which has one slash of two."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO (named pipe)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_NO_FILE = {
    errno.ELOOP: "a loop of links",
    errno.ENOTDIR: "a path through a file",
    errno.ENAMETOOLONG: "longer than a path may be",
}


def open_regular(path: Path) -> BufferedReader:
    """A regular file, or a link to one, opened for reading; it may have any size.

    Raises:
        FileNotFoundError: If there is none.
        CorruptData: If it is something else; says what.
        StoreUnavailable: If it may not be read.
    """
    try:
        with disk_errors_named(path):
            # Before, since opening a device can have effects; after, since it may be another file by then.
            _check_regular(path, path.stat())
            file = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115 the caller closes it
            try:
                _check_regular(path, os.fstat(file.fileno()))
            except CorruptData:
                file.close()
                raise
            return file
    except (OSError, ValueError) as error:
        found = "no path" if isinstance(error, ValueError) else _NO_FILE.get(error.errno or 0)
        if found is None:
            raise
        raise _not_regular(path, found) from error


def read_regular(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """All bytes of a regular file.

    Raises:
        CorruptData: If it has more than `max_bytes`, of which no more than one is read; or as `open_regular`.
        FileNotFoundError: As `open_regular`.
        StoreUnavailable: As `open_regular`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= max_bytes:
            data = file.read(size + 1)
            # It may grow meanwhile.
            if len(data) > size:
                data += file.read(max_bytes + 1 - len(data))
            if (size := max(size, len(data))) <= max_bytes:
                return data
    raise CorruptData(f"{path} has {size} bytes, at most {max_bytes} are read of such a file")


def is_regular(path: Path) -> bool:
    """Whether there is a regular file, or a link to one; False for what cannot be a path."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether there is a folder, or a link to one; False for what cannot be a path."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def stays_inside(followed: Path, root: Path) -> bool:
    """Whether a path, its links followed, is in a folder, or a file that a snapshot of the Hub's cache links to.

    `huggingface_hub` stores files in `blobs` of a data set's folder; `snapshots/REVISION` beside it has links to them.
    Any other link out of a folder may be a stranger's, to a file that is not his.

    Args:
        followed: what `Path.resolve` gave.
        root: the folder, as `Path.resolve` gives it; in a snapshot, or a snapshot.
    """
    if followed.is_relative_to(root):
        return True
    snapshot = next((folder for folder in (root, *root.parents) if folder.parent.name == "snapshots"), None)
    return snapshot is not None and followed.parent == snapshot.parent.parent / "blobs"


def refuse_special_files(folder: Path) -> None:
    """Refuses a folder that a library is to read if it holds anything but folders and regular files.

    Raises:
        CorruptData: If it does; names the first.
    """
    for path in sorted(folder.iterdir()):
        # What a link to nothing should have been, the library looks for itself.
        with suppress(FileNotFoundError):
            if not path.is_dir():
                open_regular(path).close()


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def _check_regular(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise _not_regular(path, _KINDS.get(stat.S_IFMT(found.st_mode), "no regular file"))


def _not_regular(path: Path, found: str) -> CorruptData:
    return CorruptData(f"{path} is {found}, expected a regular file; put the file itself there, or name another")


def home_expanded(path: str | Path) -> Path:
    """The path with the home folder of `~` or `~user` in it.

    Raises:
        UserError: If there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        found = f"{path} begins with the home folder of an unknown user"
        raise UserError(f"{found}; write ./{path} if it is a name here") from error


def refuse_unusable(path: Path) -> None:
    """Refuses a path that some of the libraries that write stores and checkpoints cannot open or make.

    Raises:
        UserError: If it is one.
    """
    if _URL.match(str(path)):
        url = str(path)[:200].replace(":/", "://", 1)
        raise UserError(f"{url} is a URL, expected a path of this machine; fetch it, or name a place here")
    whole = path.absolute()
    try:
        str(whole).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{path} is not UTF-8, which the libraries that read and write here need; give it another name"
        ) from error
    if len(whole.parts) > MAX_PARTS:
        raise UserError(f"{str(path)[:200]}... has {len(whole.parts)} parts, at most {MAX_PARTS} are taken")
