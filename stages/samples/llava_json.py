"""Reads the records of a LLaVA data file, one JSON list or JSON lines, in order and one by one again."""

import json
from collections.abc import Iterator
from pathlib import Path

from stages.unusable_sample import UnusableSample
from storage.errors import UserError
from storage.regular_files import open_regular, read_regular

MAX_JSON_BYTES = 4 * 2**30
"""A JSON list is held in memory while it is packed; LLaVA-665k is 1 GB. Larger files come as JSON lines."""

MAX_LINE_BYTES = 16 * 2**20
"""Bound on one JSON line: a file without line ends must not be read as one line."""

JSONL_SUFFIXES = (".jsonl", ".ndjson")

_BOM = b"\xef\xbb\xbf"
_LINES = "if it holds one record a line, name it .jsonl"


class JsonList:
    """One JSON list, held in memory; positions are indices."""

    def __init__(self, source: Path) -> None:
        if (num_bytes := source.stat().st_size) > MAX_JSON_BYTES:
            found = f"{source} has {num_bytes:,} bytes; a JSON list is read whole and may have {MAX_JSON_BYTES:,}"
            raise UserError(f"{found}; write one record a line and name the file .jsonl: those are streamed")
        try:
            value: object = json.loads(read_regular(source, MAX_JSON_BYTES).removeprefix(_BOM).decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(
                f"{source} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}; convert it"
            ) from error
        except json.JSONDecodeError as error:
            found = f"{source} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
            raise UserError(f"{found}; {_LINES}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{source} is not JSON that can be read: {error}") from error
        if not isinstance(value, list):
            found = f"{source} holds one {type(value).__name__}, expected a list of LLaVA records"
            raise UserError(f"{found}; {_LINES}")
        self._records: list[object] = value

    def positions(self) -> Iterator[int]:
        """The indices of the list; a record's ordinal is its number in this sequence."""
        return iter(range(len(self._records)))

    def load(self, position: int) -> object:
        """The list's item, not validated."""
        return self._records[position]


class JsonLines:
    """One JSON record a line, read from the disk each time; positions are byte offsets.

    Blank lines are no records.
    """

    def __init__(self, source: Path) -> None:
        self._source = source

    def positions(self) -> Iterator[int]:
        """The byte offset of each line that is not blank."""
        with open_regular(self._source) as lines:
            offset = len(_BOM) if lines.read(len(_BOM)) == _BOM else 0
            lines.seek(offset)
            while piece := lines.readline(MAX_LINE_BYTES):
                start, blank = offset, not piece.strip()
                offset += len(piece)
                while piece and not piece.endswith(b"\n"):
                    piece = lines.readline(MAX_LINE_BYTES)
                    offset += len(piece)
                    blank = blank and not piece.strip()
                if not blank:
                    yield start

    def load(self, position: int) -> object:
        """The record that begins at byte `position`, not validated.

        Raises:
            UnusableSample: If the line is too long, or not JSON in UTF-8.
        """
        with open_regular(self._source) as lines:
            lines.seek(position)
            line = lines.readline(MAX_LINE_BYTES + 1)
        if len(line) > MAX_LINE_BYTES:
            raise UnusableSample("line_too_long", f"over {MAX_LINE_BYTES:,} bytes at byte {position}")
        value: object
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UnusableSample("not_utf8", f"at byte {position + error.start}") from error
        except json.JSONDecodeError as error:
            raise UnusableSample("bad_json_line", f"{error.msg} at byte {position}, column {error.colno}") from error
        except (ValueError, RecursionError) as error:
            raise UnusableSample("bad_json_line", f"{error} at byte {position}") from error
        return value


LlavaRecords = JsonList | JsonLines
"""A data file read twice: once through to learn what is in it, then record by record in another order."""


def open_llava_records(source: Path) -> LlavaRecords:
    """The records of `source`: JSON lines when its name ends in .jsonl or .ndjson, one JSON list otherwise.

    Raises:
        UserError: If there is no such file, it is no regular one, or the JSON list is too large or not one in UTF-8.
    """
    try:
        open_regular(source).close()
    except FileNotFoundError:
        raise UserError(f"no data file at {source}; expected a LLaVA .json list or .jsonl file") from None
    return JsonLines(source) if source.suffix.lower() in JSONL_SUFFIXES else JsonList(source)
