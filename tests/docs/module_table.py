"""Writes the list of modules in `docs/architecture.md` from the first lines of their docstrings.

python -m tests.docs.module_table
"""

import ast
from pathlib import Path

from tests.docs.markdown import ROOT

DOCUMENT = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- modules: made by tests/docs/module_table.py -->", "<!-- end -->"


def module_table() -> str:
    """A heading a package, a line a module; an `__init__.py` describes its package."""
    parts = []
    for name in ("pipeline", "stages", "storage"):
        files = sorted((ROOT / name).rglob("*.py"))
        for folder in sorted({file.parent for file in files}):
            modules = [file for file in files if file.parent == folder and file.name != "__init__.py"]
            rows = [f"| `{file.name}` | {_first_line(file)} |" for file in modules]
            title = f"### {folder.relative_to(ROOT).as_posix()}/"
            parts += [title, "", _first_line(folder / "__init__.py"), "", "| module | what it owns |", "| --- | --- |"]
            parts += [*rows, ""]
    return "\n".join(parts)


def parts_of_document() -> tuple[str, str, str]:
    """The document before, between and behind the two markers."""
    before, _, rest = DOCUMENT.read_text("utf-8").partition(BEGIN)
    between, _, behind = rest.partition(END)
    return before, between, behind


def _first_line(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text("utf-8"))) if file.exists() else ""
    return (docstring or "").partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")


def main() -> None:
    """Writes the list into the document."""
    before, _, behind = parts_of_document()
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{module_table()}\n{END}{behind}", "utf-8")


if __name__ == "__main__":
    main()
