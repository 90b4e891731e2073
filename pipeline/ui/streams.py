"""Standard output and standard error as all parts of a process write to them: text, and nothing that steers."""

import io
import re
import sys
from collections.abc import Iterable
from typing import Any

from storage.printable import printable

_BAR_MOVES = re.compile(r"\r|(\x1b\[A)+\Z")
"""What a library's progress bar writes before itself; in front of a text they hide nothing of it."""


def guard_streams() -> None:
    """Makes all that is written from now on printable, by whomever: warnings, log lines and tracebacks too.

    What the encoding of a terminal lacks becomes an escape as well, so that no text ends a command.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        if stream is not None and not isinstance(stream, GuardedStream):
            setattr(sys, name, GuardedStream(stream))


def say(text: str) -> None:
    """Writes one message to standard error, from any process.

    Further lines are indented: a name with a line end in it cannot look like a message of its own.
    """
    print(printable(text, keep="\n").replace("\n", "\n  "), file=sys.stderr)


class GuardedStream:
    """A stream of a terminal or a file through which printable text passes, line ends and tabs."""

    def __init__(self, stream: Any) -> None:
        self.unguarded = stream

    def write(self, text: str) -> int:
        """Writes the text; gives its length, as streams do."""
        moves = _BAR_MOVES.match(text)
        start = moves.end() if moves else 0
        self.unguarded.write(text[:start] + printable(text[start:], keep="\n\t"))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes each."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unguarded, name)
