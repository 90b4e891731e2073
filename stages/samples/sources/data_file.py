"""Opens what the user names as data, by its content: JSON list or lines, packed with gzip or not, Parquet, Arrow."""

import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from stages.samples.sources.json_files import BOM, JsonLines, JsonList
from stages.samples.sources.saved_folder import parquet_files, saved_streams
from stages.samples.sources.tables import ArrowStreams, ParquetFiles
from storage.errors import UserError
from storage.regular_files import is_folder, open_regular

EXPECTED = "a JSON list, JSON lines, either of them as .gz, Parquet, or a folder of a saved data set"
MAX_UNPACK_RATIO = 200
"""Times its own size that a .gz may become: conversations shrink to a tenth, nothing but blanks to a thousandth."""
MIN_UNPACK_BYTES = 2**30
"""What a .gz may become however small it is."""

_HEAD_BYTES = 64 * 2**10
_OTHERS = {
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\x28\xb5\x2f\xfd": "packed with Zstandard; unpack it",
    b"BZh": "packed with bzip2; unpack it",
    b"\xfd7zXZ": "packed with xz; unpack it",
    b"ARROW1": "an Arrow file for random access (Feather); save it as Parquet",
    b"version https://git-lfs": "a pointer of Git LFS, not the data; run `git lfs pull`",
    b"<": "a web page or XML; fetch the data again",
}


class Source(Protocol):
    """The records of a data file, which can be read any number of times."""

    def scan(self) -> Iterator[object]:
        """Each record in order; in place of one that cannot be read, the UnusableSample that says why."""


@contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """The records of a data file or of a folder of a saved data set.

    Raises:
        UserError: If there is no such file, or it is none that is read.
    """
    if is_folder(path):
        streams = saved_streams(path)
        yield ArrowStreams(streams) if streams is not None else ParquetFiles(parquet_files(path))
        return
    try:
        file = open_regular(path)
    except FileNotFoundError:
        raise UserError(f"no data file at {path}; expected {EXPECTED}") from None
    with file:
        head = file.peek(8)[:8]
        if head.startswith(b"PAR1"):
            yield ParquetFiles([path])
        elif head.startswith(b"\xff\xff\xff\xff"):
            yield ArrowStreams([path])
        elif head.startswith(b"\x1f\x8b"):
            with _damage_named(path), _Unpacking(file, path) as unpacking:
                yield _json_source(cast("BinaryIO", unpacking), path)
        else:
            yield _json_source(file, path)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is a damaged gzip file, or cut short ({error}); fetch it again") from error


class _Unpacking(gzip.GzipFile):
    """What is in a gzip file, unpacked as it is read; refused once it is far larger than the file."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(fileobj=file)
        self._path, self._packed_bytes = path, os.fstat(file.fileno()).st_size
        self._max_bytes = max(MIN_UNPACK_BYTES, MAX_UNPACK_RATIO * self._packed_bytes)

    def read(self, size: int | None = -1) -> bytes:
        return self._bounded(super().read(size))

    def readline(self, size: int | None = -1) -> bytes:
        return self._bounded(super().readline(size))

    def _bounded(self, data: bytes) -> bytes:
        if self.tell() > self._max_bytes:
            found = f"{self._path} has {self._packed_bytes:,} bytes and unpacks to more than {self._max_bytes:,}"
            raise UserError(f"{found}, which conversations do not; if yours do, unpack it and name what comes out")
        return data


def _json_source(file: BinaryIO, path: Path) -> Source:
    file.seek(0)
    head = file.read(_HEAD_BYTES)
    start = len(BOM) if head.startswith(BOM) else 0
    first = head[start:].lstrip()
    while not first and (head := file.read(_HEAD_BYTES)):
        first = head.lstrip()
    if first.startswith(b"["):
        return JsonList(file, str(path), start)
    if first.startswith(b"{") or not first:
        return JsonLines(file, str(path), start)
    what = next((what for magic, what in _OTHERS.items() if first.startswith(magic)), None)
    raise UserError(f"{path} is {what}" if what else f"{path} begins with {first[:16]!r}; expected {EXPECTED}")
