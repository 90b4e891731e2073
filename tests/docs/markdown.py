"""Reads the project's Markdown pages: prose, code, headings and links."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FOLDERS = ("docs", "examples", "benchmarks", "pipeline", "stages", "storage")
_FENCE = re.compile(r"^(```|~~~)")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Page:
    """One Markdown file.

    Attributes:
        path: relative to the repository.
        lines: every line.
        fenced: for each line whether it belongs to a fenced code block, the fences included.
    """

    path: str
    lines: tuple[str, ...]
    fenced: tuple[bool, ...]

    @property
    def prose(self) -> list[tuple[int, str]]:
        """Numbers and texts of the lines outside fenced code."""
        return [(n, line) for n, line in enumerate(self.lines, 1) if not self.fenced[n - 1]]

    @property
    def anchors(self) -> set[str]:
        """What a link to a heading of this page may name, as GitHub makes it."""
        titles = [line.lstrip("#").strip() for _, line in self.prose if re.match(r"#+ ", line)]
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}

    @property
    def links(self) -> list[str]:
        """Targets of all links and images."""
        return _LINK.findall(self._text)

    @property
    def spans(self) -> list[str]:
        """Inline code."""
        return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", self._text)]

    @property
    def _text(self) -> str:
        return "\n".join(line for _, line in self.prose)

    def blocks(self, *languages: str) -> list[str]:
        """Fenced code of these languages, and with "" indented code too."""
        found, language, block = [], None, list[str]()
        for line, inside in zip(self.lines, self.fenced, strict=True):
            if inside and _FENCE.match(line):
                if language is None:
                    language, block = line.strip("`~ \n"), []
                else:
                    found += ["\n".join(block)] if language in languages else []
                    language = None
            elif language is not None:
                block.append(line)
            elif "" in languages and line.startswith("    "):
                found.append(line.strip())
        return found


def _read(path: Path) -> Page:
    lines = tuple(path.read_text("utf-8").splitlines())
    fenced, inside = [], False
    for line in lines:
        fence = bool(_FENCE.match(line))
        fenced.append(inside or fence)
        inside ^= fence
    return Page(path.relative_to(ROOT).as_posix(), lines, tuple(fenced))


PAGES = {
    page.path: page
    for page in map(
        _read, sorted([*ROOT.glob("*.md"), *(path for name in _FOLDERS for path in (ROOT / name).rglob("*.md"))])
    )
}
"""Every page, by its path."""
