"""Names by which tables and report pages call models that were given as paths."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.report.page import TEACHER


def shown_names(paths: Sequence[str | Path]) -> list[str]:
    """Of each path its last part; the whole path where two have the same, or where it is the teacher's name."""
    last = [Path(path).name or Path(path).resolve().name for path in paths]
    whole = [f"./{path}" if str(path) == TEACHER else str(path) for path in paths]
    return [name if last.count(name) == 1 and name != TEACHER else path for name, path in zip(last, whole, strict=True)]
