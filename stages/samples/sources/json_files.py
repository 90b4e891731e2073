"""Records of a file that is one JSON list, or has one JSON record a line; neither is held in memory."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import BinaryIO

from stages.unusable_sample import UnusableSample
from storage.errors import UserError

MAX_RECORD_BYTES = 16 * 2**20
"""Bound on one record: a file without line ends must not be read as one line. An image inside it takes its share."""

MAX_READ_CHARS = 4 * MAX_RECORD_BYTES
"""Characters of a list's record that are read until its end is found; with more, nothing behind it can be read."""

BOM = b"\xef\xbb\xbf"
_READ_AT_ONCE = 2**20
_BLANK = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class _JsonFile:
    """A file of JSON records from byte `start` on; `name` is for messages."""

    def __init__(self, file: BinaryIO, name: str, start: int = 0) -> None:
        self._file, self._name, self._start = file, name, start


class JsonLines(_JsonFile):
    """One JSON record a line. Blank lines are no records."""

    def scan(self) -> Iterator[object]:
        """Each record; in place of one that cannot be read, the UnusableSample that says why."""
        offset = self._start
        self._file.seek(offset)
        while line := self._file.readline(MAX_RECORD_BYTES + 1):
            start, record, is_blank = offset, line, not line.strip()
            offset += len(line)
            while line and not line.endswith(b"\n"):
                line = self._file.readline(MAX_RECORD_BYTES)
                offset += len(line)
                is_blank = is_blank and not line.strip()
            if not is_blank:
                yield _parsed(record, start)


class JsonList(_JsonFile):
    """One JSON list of records; as much of it is in memory as its largest record takes."""

    def scan(self) -> Iterator[object]:
        """Each record; one that is too long comes as `UnusableSample`.

        Raises:
            UserError: If the file is not one JSON list in UTF-8, at the first place where it is not.
        """
        self._file.seek(self._start)
        text = _Text(self._file, self._start)
        try:
            text.take("[")
            ended = text.next_char() == "]"
            while not ended:
                text.next_char()
                yield text.take_value()
                if not (ended := text.next_char() == "]"):
                    text.take(",")
            text.take("]")
            if text.next_char():
                raise json.JSONDecodeError("Extra data", text.text, text.at)  # noqa: TRY301 named like any other below
        except UnicodeDecodeError as error:
            at = self._file.tell() - len(error.object) + error.start
            found = f"byte 0x{error.object[error.start]:02x} at offset {at}"
            raise UserError(f"{self._name} is not UTF-8: {found}; convert it") from error
        except json.JSONDecodeError as error:
            found = f"{self._name} is not a whole JSON list: {error.msg} at {self._place(text.byte_of(error.pos))}"
            raise UserError(f"{found}; a file that holds one record a line must not begin with '['") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self._name} is not JSON that can be read: {error}, at byte {text.offset}") from error

    def _place(self, offset: int) -> str:
        line = column = 1
        self._file.seek(self._start)
        left = offset - self._start
        while left > 0 and (piece := self._file.read(min(left, _READ_AT_ONCE))):
            left -= len(piece)
            line += piece.count(b"\n")
            column = len(piece) - piece.rfind(b"\n") if b"\n" in piece else column + len(piece)
        return f"line {line}, column {column}"


class _Text:
    """Text of a file, decoded piece by piece; what was taken is forgotten."""

    def __init__(self, file: BinaryIO, offset: int) -> None:
        self._file, self._decoder = file, codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.offset = "", 0, offset
        self._ended = False

    def byte_of(self, position: int) -> int:
        """Where in the file character `position` of `text` is."""
        return self.offset + len(self.text[self.at : position].encode())

    def next_char(self) -> str:
        """The next character that is not blank, which is not taken yet; empty at the end."""
        while True:
            blank = _BLANK.match(self.text, self.at)
            self._advance(blank.end() if blank else self.at)
            if self.at < len(self.text):
                return self.text[self.at]
            if self._ended:
                return ""
            self._read_more()

    def take(self, wanted: str) -> None:
        """Takes a character that must be the next."""
        if self.next_char() != wanted:
            raise json.JSONDecodeError(f"Expecting {wanted!r}", self.text, self.at)
        self._advance(self.at + 1)

    def take_value(self) -> object:
        """Takes the value that begins here; one that is too long for a record comes as `UnusableSample`."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
                # A number may go on in the next piece.
                if end < len(self.text) or self._ended:
                    begin = self.offset
                    self._advance(end)
                    return value if self.offset - begin <= MAX_RECORD_BYTES else _too_long(begin)
            except json.JSONDecodeError:
                # It may be whole once more is read.
                if self._ended:
                    raise
            if len(self.text) - self.at > MAX_READ_CHARS:
                raise ValueError(f"a record has more than {MAX_READ_CHARS:,} characters")
            self._read_more()

    def _advance(self, end: int) -> None:
        self.offset, self.at = self.byte_of(end), end

    def _read_more(self) -> None:
        left = self.text[self.at :]
        # Twice as much each time, as a long record is decoded anew after each.
        data = self._file.read(max(_READ_AT_ONCE, len(left)))
        self._ended = not data
        self.text, self.at = left + self._decoder.decode(data, self._ended), 0


def _too_long(offset: int) -> UnusableSample:
    return UnusableSample("line_too_long", f"over {MAX_RECORD_BYTES:,} bytes at byte {offset}")


def _parsed(line: bytes, offset: int) -> object:
    if len(line) > MAX_RECORD_BYTES:
        return _too_long(offset)
    try:
        value: object = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return UnusableSample("not_utf8", f"at byte {offset + error.start}")
    except json.JSONDecodeError as error:
        return UnusableSample("bad_json_line", f"{error.msg} at byte {offset}, column {error.colno}")
    except (ValueError, RecursionError) as error:
        return UnusableSample("bad_json_line", f"{error} at byte {offset}")
    return value
