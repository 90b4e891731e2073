"""Records of Parquet files and of saved Hugging Face data sets (Arrow streams), a few rows in memory at a time."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from stages.unusable_sample import UnusableSample
from storage.errors import UserError, first_line
from storage.regular_files import open_regular

_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"

_ROWS_AT_ONCE = 16
"""Rows of a Parquet file that are decoded together: they may hold a megabyte each."""


class _Tables(ABC):
    """Files with columns, one after the other; a record is a row as a dict."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._arrow: Any = _pyarrow()

    def scan(self) -> Iterator[object]:
        """Each record; in place of one that cannot be read, the UnusableSample that says why.

        Raises:
            UserError: If a file is damaged or no such file.
        """
        for path in self._paths:
            with self._faults_named(path), open_regular(path) as file:
                num_before = 0
                for batch in self._batches(file):
                    for row in range(batch.num_rows):
                        yield _row(batch, row, num_before)
                    num_before += batch.num_rows

    @contextmanager
    def _faults_named(self, path: Path) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise UserError(f"there is no {path}, which belongs to the data; fetch it") from None
        except (self._arrow.ArrowException, EOFError, MemoryError, OSError, ValueError) as error:
            what = f"{path} cannot be read as {self._kind}: {first_line(error)[:300]}"
            to_do = "it is damaged or cut short, fetch it again"
            if isinstance(error, MemoryError):
                to_do = "its rows, read a few at a time, need more memory than there is; give the command more"
            elif isinstance(error, NotImplementedError):
                to_do = "install a newer pyarrow, or save the data without it"
            raise UserError(f"{what}; {to_do}") from error

    _kind: str

    @abstractmethod
    def _batches(self, file: BinaryIO) -> Iterator[Any]:
        """All rows of a file, those that are decoded together as one batch."""


class ParquetFiles(_Tables):
    """Parquet files."""

    _kind = "Parquet"

    def _batches(self, file: BinaryIO) -> Iterator[Any]:
        from pyarrow import parquet

        table = parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
        # One row group after the other: several at a time would all be in memory.
        for group in range(table.num_row_groups):
            yield from table.iter_batches(_ROWS_AT_ONCE, row_groups=[group], use_threads=False)


class ArrowStreams(_Tables):
    """Arrow streams, as `Dataset.save_to_disk` writes them."""

    _kind = "an Arrow stream"

    def _batches(self, file: BinaryIO) -> Iterator[Any]:
        offset = file.tell()
        for batch in self._arrow.ipc.open_stream(file):
            # Of a stranger's file: offsets that lead out of a buffer would be followed.
            batch.validate(full=True)
            yield batch
            offset = file.tell()
        # The library takes a file that ends between two messages for a whole one.
        end = file.tell()
        file.seek(max(offset, end - len(_END_OF_STREAM)))
        if file.read(end - file.tell()) != _END_OF_STREAM:
            raise EOFError("it ends without the mark of an end")


def _row(batch: Any, row: int, num_before: int) -> object:
    try:
        return batch.slice(row, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return UnusableSample("not_utf8", f"a text of row {num_before + row} is not UTF-8")


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise UserError(
            "Parquet files and saved data sets need pyarrow, which is not installed; "
            "pip install 'compodistill[datasets]'"
        ) from error
    return pyarrow
