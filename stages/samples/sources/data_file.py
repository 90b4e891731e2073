"""Opens what the user names as data, by its content: JSON list or lines, packed with gzip or not, Parquet, Arrow."""

import gzip
import tempfile
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
MAX_UNPACKED_BYTES = 2**40
"""Most bytes that a .gz may become."""

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
    """A data file that is read twice: once through to learn what is in it, then record by record in another order."""

    def scan(self) -> Iterator[tuple[tuple[int, ...], object]]:
        """Each record with its position; in place of one that cannot be read, the UnusableSample that says why."""

    def load(self, position: tuple[int, ...], /) -> object:
        """The record at a position once more.

        Raises:
            UnusableSample: If it cannot be read any more.
        """


@contextmanager
def open_source(path: Path, scratch: Path | None = None) -> Iterator[Source]:
    """The records of a data file or of a folder of a saved data set.

    A gzip file is unpacked into a file without a name in the folder `scratch`, since its records are read in another
    order later; without a `scratch` its records can only be scanned.

    Raises:
        UserError: If there is no such file, or it is none that is read.
    """
    if is_folder(path):
        streams = saved_streams(path)
        yield from _closing(ArrowStreams(streams) if streams is not None else ParquetFiles(parquet_files(path)))
        return
    try:
        file = open_regular(path)
    except FileNotFoundError:
        raise UserError(f"no data file at {path}; expected {EXPECTED}") from None
    with file:
        head = file.peek(8)[:8]
        if head.startswith(b"PAR1"):
            yield from _closing(ParquetFiles([path]))
        elif head.startswith(b"\xff\xff\xff\xff"):
            yield from _closing(ArrowStreams([path]))
        elif head.startswith(b"\x1f\x8b"):
            with _unpacked(file, path, scratch) as unpacked:
                yield _json_source(unpacked, path)
        else:
            yield _json_source(file, path)


def _closing(tables: ArrowStreams | ParquetFiles) -> Iterator[Source]:
    try:
        yield tables
    finally:
        tables.close()


@contextmanager
def _unpacked(file: BinaryIO, path: Path, scratch: Path | None) -> Iterator[BinaryIO]:
    try:
        with gzip.GzipFile(fileobj=file) as unpacking:
            if scratch is None:
                yield cast("BinaryIO", unpacking)
                return
            with tempfile.TemporaryFile(dir=scratch) as unpacked:
                while piece := unpacking.read(2**20):
                    if unpacked.tell() + len(piece) > MAX_UNPACKED_BYTES:
                        raise UserError(f"{path} unpacks to more than {MAX_UNPACKED_BYTES:,} bytes; split it")
                    unpacked.write(piece)
                unpacked.flush()
                yield unpacked
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is a damaged gzip file, or cut short ({error}); fetch it again") from error


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
