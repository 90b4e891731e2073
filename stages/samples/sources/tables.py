"""Records of Parquet files and of saved Hugging Face data sets (Arrow streams), a few rows in memory at a time."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from stages.unusable_sample import UnusableSample
from storage.errors import UserError, first_line
from storage.regular_files import open_regular

_ROWS_AT_ONCE = 16
"""Rows of a Parquet file that are decoded together: they may hold a megabyte each."""

Place = tuple[int, ...]
"""Number of the file, then of the rows that are decoded together, then of the row in these."""


class _Tables(ABC):
    """Files with columns; a record is a row as a dict."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._arrow: Any = _pyarrow()
        self._opened = ExitStack()
        self._number = -1
        self._last: tuple[Place, Any] = ((), None)

    def scan(self) -> Iterator[tuple[Place, object]]:
        """Each record with its position; in place of one that cannot be read, the UnusableSample that says why.

        Raises:
            UserError: If a file is damaged or no such file.
        """
        for number in range(len(self._paths)):
            with self._faults_named(number):
                self._open(number)
                for where, batch in self._batches():
                    for row in range(batch.num_rows):
                        yield (number, *where, row), _row(batch, row)

    def load(self, position: Place) -> object:
        """The record at `position` once more, not validated; best asked for in the order of `scan`."""
        *place, row = position
        if self._last[0] != tuple(place):
            number, *where = place
            with self._faults_named(number):
                if number != self._number:
                    self._open(number)
                self._last = tuple(place), self._batch_at(*where)
        record = _row(self._last[1], row)
        if isinstance(record, UnusableSample):
            raise record
        return record

    def close(self) -> None:
        """Close the file that is open."""
        self._opened.close()

    def _open(self, number: int) -> None:
        self._opened.close()
        self._number, self._last = number, ((), None)
        self._begin(self._opened.enter_context(open_regular(self._paths[number])))

    @contextmanager
    def _faults_named(self, number: int) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise UserError(f"there is no {self._paths[number]}, which belongs to the data; fetch it") from None
        except (self._arrow.ArrowException, EOFError, MemoryError, OSError, ValueError) as error:
            what = f"{self._paths[number]} cannot be read as {self._kind}: {first_line(error)[:300]}"
            to_do = "it is damaged or cut short, fetch it again"
            if isinstance(error, MemoryError):
                to_do = "its rows, read a few at a time, need more memory than there is; give the command more"
            elif isinstance(error, NotImplementedError):
                to_do = "install a newer pyarrow, or save the data without it"
            raise UserError(f"{what}; {to_do}") from error

    _kind: str

    @abstractmethod
    def _begin(self, file: Any) -> None:
        """Reads what stands at the beginning, or the end, of a newly opened file."""

    @abstractmethod
    def _batches(self) -> Iterator[tuple[Place, Any]]:
        """All rows of the open file, those that are decoded together as one batch, with its place."""

    @abstractmethod
    def _batch_at(self, *where: int) -> Any:
        """One of these batches once more."""


class ParquetFiles(_Tables):
    """Parquet files, one after the other. A batch is at (row group, number in it)."""

    _kind = "Parquet"

    def _begin(self, file: Any) -> None:
        from pyarrow import parquet

        self._table = parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
        self._at: tuple[Place, Iterator[Any]] = ((-1, 0), iter(()))

    def _batches(self) -> Iterator[tuple[Place, Any]]:
        for group in range(self._table.num_row_groups):
            yield from (((group, number), batch) for number, batch in enumerate(self._batches_of(group)))

    def _batch_at(self, *where: int) -> Any:
        # A row group can be read from its beginning only, so what is asked for in order is read once.
        (at_group, at_number), batches = self._at
        group, number = where
        if group != at_group or number < at_number:
            batches, at_number = self._batches_of(group), 0
        batch = next(islice(batches, number - at_number, None), None)
        if batch is None:
            raise ValueError("it has fewer rows than when it was first read")
        self._at = ((group, number + 1), batches)
        return batch

    def _batches_of(self, group: int) -> Iterator[Any]:
        found: Iterator[Any] = self._table.iter_batches(_ROWS_AT_ONCE, row_groups=[group], use_threads=False)
        return found


class ArrowStreams(_Tables):
    """Arrow streams, as `Dataset.save_to_disk` writes them. A batch is at (byte in the file,)."""

    _kind = "an Arrow stream"

    def _begin(self, file: Any) -> None:
        self._file = file
        self._schema = self._arrow.ipc.read_schema(self._arrow.ipc.read_message(file))
        # Their values are in other messages, which may come anywhere before a batch.
        if coded := [field.name for field in self._schema if self._has_dictionary(field.type)]:
            found = f"{file.name} has dictionary-encoded columns ({', '.join(coded)}), which are read of Parquet alone"
            raise UserError(f"{found}; save it as Parquet, or cast these columns to the type of their values")

    def _has_dictionary(self, kind: Any) -> bool:
        if self._arrow.types.is_dictionary(kind):
            return True
        return any(self._has_dictionary(kind.field(number).type) for number in range(kind.num_fields))

    def _batches(self) -> Iterator[tuple[Place, Any]]:
        while True:
            offset = self._file.tell()
            try:
                batch = self._batch_at(offset)
            except EOFError:
                # A whole stream ends in a mark.
                if self._file.tell() == offset:
                    raise
                return
            yield (offset,), batch

    def _batch_at(self, *where: int) -> Any:
        self._file.seek(where[0])
        message = self._arrow.ipc.read_message(self._file)
        batch = self._arrow.ipc.read_record_batch(message, self._schema)
        # Of a stranger's file: offsets that lead out of a buffer would be followed.
        batch.validate(full=True)
        return batch


def _row(batch: Any, row: int) -> object:
    try:
        return batch.slice(row, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return UnusableSample("not_utf8", f"a text of row {row} is not UTF-8")


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
