"""Which files of a folder are one data set: a saved Hugging Face `Dataset`, or the Parquet files of one split."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from storage.digests import parse_object
from storage.errors import UserError
from storage.regular_files import is_regular, read_regular

_PART = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(-\w+)?")


def saved_streams(folder: Path) -> list[Path] | None:
    """The Arrow files of a `Dataset.save_to_disk` folder in their order; None if it is none.

    Raises:
        UserError: If it holds several splits, rows that a filter left out, or names files elsewhere.
    """
    if is_regular(folder / "dataset_dict.json"):
        splits = _object(folder / "dataset_dict.json").get("splits")
        raise UserError(f"{folder} holds several splits: {splits}; name the folder of one of them")
    if not is_regular(folder / "state.json"):
        return None
    state = _object(folder / "state.json")
    # The second name is that of the library's first versions.
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise UserError(f"{folder} has a list of chosen rows, which is not read; save it after flatten_indices()")
    try:
        names = [str(each["filename"]) for each in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder}/state.json names no data files; save the data set again") from error
    if wrong := [name for name in names if "/" in name or name in ("", ".", "..")]:
        raise UserError(f"{folder}/state.json names the file {wrong[0]!r}, which is not in this folder")
    return [folder / name for name in names]


def parquet_files(folder: Path) -> list[Path]:
    """The Parquet files of a folder by name; those below it are others.

    Raises:
        UserError: If there are none, several splits, or if a split lacks a part of those that its names count.
    """
    files = sorted(folder.glob("*.parquet"))
    if not files:
        below = sorted({str(file.parent) for file in folder.glob("*/*.parquet")})
        hint = f"; there are some in {', '.join(below[:5])}" if below else ""
        found = f"{folder} is a folder without Parquet files or a saved data set{hint}"
        raise UserError(f"{found}; name a data file, or a folder of one split")
    parts = [part for file in files if (part := _PART.fullmatch(file.stem))]
    splits = sorted({part["split"] for part in parts})
    if len(splits) > 1 or 0 < len(parts) < len(files):
        found = f"{folder} holds several splits: {', '.join(splits[:10])}" + (" and others" if len(splits) == 1 else "")
        raise UserError(f"{found}; name one file, or put each split into a folder of its own")
    _check_all_there(folder, [(int(part["number"]), int(part["count"])) for part in parts])
    return files


def _check_all_there(folder: Path, parts: Sequence[tuple[int, int]]) -> None:
    for count in {count for _, count in parts}:
        if missing := sorted(set(range(count)) - {number for number, _ in parts}):
            found = f"{folder} lacks {len(missing)} of the {count} parts that the names of its files count"
            raise UserError(f"{found}, the first is number {missing[0]}; fetch it, or rename the files to do without")


def _object(path: Path) -> dict[str, Any]:
    return parse_object(read_regular(path), str(path), "save the data set again")
