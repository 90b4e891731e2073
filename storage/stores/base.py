"""The protocol every store keeps, and which paths it accepts."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from storage.digests import file_sha256
from storage.regular_files import MAX_BYTES

PARTIAL = ".partial"
"""Suffix of what is still being written; readers never see such a file, `clean_partials` removes abandoned ones."""


class FileInfo(NamedTuple):
    """What a record says of a stored file: its size and 64 hex digits."""

    bytes: int
    sha256: str


ExpectedFiles = Mapping[str, FileInfo]
"""Path relative to what is fetched ("" for a file itself) -> what its bytes must be."""


def measure_files(folder: Path) -> dict[str, FileInfo]:
    """Size and sha256 of every file below `folder`, by their sorted paths in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): FileInfo(path.stat().st_size, file_sha256(path)) for path in files}


class Store(Protocol):
    """A folder of files, local or remote. Paths are relative, with `/` between their parts.

    A store can be pickled and opened in another process: it holds its address, not a connection.
    """

    url: str
    """What `open_store` takes to open the same store again."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def read(self, path: str, max_bytes: int = MAX_BYTES) -> bytes:
        """All bytes of a file; FileNotFoundError when it is absent, CorruptData when it has more than `max_bytes`."""

    def exists(self, path: str) -> bool:
        """Whether a file of this name exists."""

    def write(self, path: str, data: bytes) -> None:
        """Create or replace a file; readers see the old bytes or the new ones, never a part."""

    def create(self, path: str, data: bytes) -> bool:
        """Create a file unless it exists, and tell whether it now holds `data`.

        Of several callers with different data exactly one gets True. So do equal calls, and one whose answer got lost.
        """

    def check_create(self) -> None:
        """Refuses a place where `create` cannot work, before there is anything to create; leaves nothing behind."""

    def folders(self, prefix: str) -> list[str]:
        """Sorted paths of the folders directly in the folder `prefix`, partial ones left out; none is looked into."""

    def list(self, prefix: str = "") -> list[str]:
        """Sorted paths of all files below the folder `prefix` ("": all files), partial ones left out."""

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of each file that `list` names, in its order."""

    def local(self, path: str, expect: ExpectedFiles | None = None, holder: object | None = None) -> Path:
        """A local file or folder that holds `path`; a remote one is downloaded whole, once.

        Args:
            path: A file or a folder of the store.
            expect: Sizes and digests; a download that differs raises CorruptData and is not kept.
                A local folder is not read for this: compare what matters when it is opened.
            holder: A downloaded copy is not evicted as long as this object lives; None is as long as the process runs.
        """

    @contextmanager
    def as_stored(self, path: str) -> "Iterator[Store]":
        """A local store that holds `path` as it is now, never an earlier download; for checking."""

    def move(self, path: str, to: str) -> None:
        """Give a file or folder another place in the store; nothing happens when it is absent."""

    def staging(self, name: str) -> Path:
        """A new, empty local folder from which `put_tree` is cheap; its name ends with its owner and `.partial`."""

    def put_tree(self, local_dir: Path, path: str) -> None:
        """Move `local_dir` to the folder `path`; one with the same content is left alone."""

    @contextmanager
    def new_tree(self, path: str) -> Iterator[Path]:
        """A new local folder, which becomes the folder `path` when the block ends, whole or not at all."""
        staging = self.staging(path)
        try:
            yield staging
            self.put_tree(staging, path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def remove_tree(self, path: str) -> None:
        """Remove a folder and all below it; nothing happens when it is absent."""

    def remove_partials(self, is_whole: Callable[[str], bool] | None = None) -> int:
        """Remove what dead writers left half-written, and tell how many such files and folders there were.

        What a live process writes is left alone, on this machine or another: see `storage.stores.owner`.

        Args:
            is_whole: Whether nothing is ever written inside the folder of this path, which then is not looked into.
        """


def is_inside(path: str) -> bool:
    """Whether `path` names something inside a store, on every system."""
    return {"", ".", ".."}.isdisjoint(path.split("/")) and "\\" not in path and all(ord(char) >= 32 for char in path)


def relative_path(path: str) -> str:
    """`path` itself, when it names something inside a store.

    Raises:
        ValueError: For absolute paths, `..`, `.`, empty parts, backslashes and control characters.
    """
    if not is_inside(path):
        raise ValueError(f"path {path!r} does not stay inside its store: give a relative one without '..'")
    return path
