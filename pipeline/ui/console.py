"""Where commands write: results to standard output, all else to standard error; one process of a group writes."""

import os
from collections.abc import Iterable
from typing import IO, Any

from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from storage.printable import printable

_NO_EDGE = 10_000
"""Characters of a line at which nothing we print has to be wrapped."""

is_main_process = os.environ.get("RANK", "0") == "0"
"""False in all but one of the processes that torchrun or accelerate starts: those stay silent."""


class PlainConsole(Console):
    """Shows text as it is, brackets and colons too, with escapes for what is not printable or not in the encoding."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    @property
    def size(self) -> ConsoleDimensions:
        """As of Rich. In a file or a pipe a table is as wide as its content, unless COLUMNS says otherwise."""
        if self.is_terminal or os.environ.get("COLUMNS"):
            return super().size
        return ConsoleDimensions(_NO_EDGE, super().size.height)

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self._width, self._height = new_size

    def render_str(self, text: str, **options: Any) -> Text:
        """As of Rich. Escapes stand here before widths are computed from the text."""
        shown = printable(text, keep="\n").encode(self.encoding, "backslashreplace").decode(self.encoding)
        return super().render_str(shown, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As of Rich. Also texts that were not strings, such as what libraries print beside a bar, come by here."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text, keep="\n"), segment.style)

    @property  # type: ignore[misc]
    def file(self) -> IO[str]:
        """The stream behind the guard of `pipeline.ui.streams`, which would take Rich's colours for a stranger's."""
        file = super().file
        unguarded: IO[str] = getattr(file, "unguarded", file)
        return unguarded


results = PlainConsole(quiet=not is_main_process)
"""What a command was run for, on standard output."""

messages = PlainConsole(stderr=True, quiet=not is_main_process)
"""Progress and notes, on standard error."""
