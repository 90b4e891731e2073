"""What was made before and stays: results of single runs in a folder, and a record that several commands add to."""

import datetime
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Runs = dict[str, dict[str, Any]]
"""By arm and seed."""


def kept(path: Path, settings: Mapping[str, Any], command: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` found, with the command that ran it and the date; from the file if that is there, else into it.

    Raises:
        ValueError: If the file is of other settings.
    """
    expected = json.loads(json.dumps(settings))
    if not path.exists():
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        made = {"settings": expected, "found": {"command": command, "date": date, **make()}}
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(made, indent=1) + "\n")
        partial.replace(path)
    read = json.loads(path.read_text())
    if read["settings"] != expected:
        raise ValueError(
            f"{path} was made with settings {read['settings']}, these are {expected}; give another --folder, or remove "
            "the file to make it again"
        )
    found: dict[str, Any] = read["found"]
    return found


def with_earlier(record: Path, settings: Mapping[str, Any], runs: Runs) -> Runs:
    """`runs` and those that the record holds beside them.

    Raises:
        ValueError: If the record is of other settings.
    """
    if not record.exists():
        return runs
    held = json.loads(record.read_text())
    found, expected = held.get("settings"), json.loads(json.dumps(settings))
    if found != expected:
        raise ValueError(
            f"{record} holds runs with settings {found}, these have {expected}; give another --out, or remove the file"
        )
    arms: Runs = held["arms"]
    return {arm: {**arms.get(arm, {}), **runs.get(arm, {})} for arm in dict.fromkeys([*arms, *runs])}
