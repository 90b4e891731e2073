"""Where results of suites lie, and what the models behind them are called."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from stages.evaluation.result import RESULT_FILE
from storage.errors import UserError
from storage.stores import open_store
from storage.stores.recognize import what_lies_at

SUITES_FOLDER: Final = "suites"
"""Of a run in a sweep: its results."""


def results_below(path: Path) -> list[Path]:
    """Folders of suites: the one that is named, or those in it, or those of a run.

    Raises:
        UserError: If there are none.
    """
    if (path / RESULT_FILE).is_file():
        return [path]
    for pattern in (f"*/{RESULT_FILE}", f"{SUITES_FOLDER}/*/{RESULT_FILE}"):
        if found := sorted(file.parent for file in path.glob(pattern)):
            return found
    instead = what_lies_at(open_store(path)) or "nothing"
    todo = "name its --output, or a suite's folder in it"
    raise UserError(f"{path} holds no result of `cdp evaluate`: {instead} is there; {todo}")


def result_names(folders: Sequence[Path]) -> list[str]:
    """A name for each suite's folder: that of the folder around it, with more of its path where others have it too."""
    around = [[part for part in folder.resolve().parts[1:-1] if part != SUITES_FOLDER] for folder in folders]

    def name(number: int) -> str:
        own = around[number]
        others = [parts for other, parts in enumerate(around) if other != number]
        for depth in range(1, len(own) + 1):
            if own[-depth:] not in [parts[-depth:] for parts in others]:
                return "/".join(own[-depth:])
        return str(folders[number])

    return [name(number) for number in range(len(folders))]
