"""Which code a process runs: that of installed packages, never that of the folder in which a command is typed.

`python -c` and `python -m`, by which other processes are started, import from that folder first.
"""

import hashlib
import os
import socket
import sys
from functools import cache
from pathlib import Path

from storage.errors import UserError

ROOT = Path(__file__).parents[1]
"""The folder that holds this project's top levels."""


def keep_children_safe() -> None:
    """Lets Python processes that are started from here on import nothing because it lies in their current folder."""
    os.environ["PYTHONSAFEPATH"] = "1"


def check_safe_path() -> None:
    """Refuses to go on in a process that imports from its current folder.

    Raises:
        UserError: If it does, as under `python -E`, which ignores what `keep_children_safe` says.
    """
    if not sys.flags.safe_path and ("" in sys.path or (str(Path.cwd()) in sys.path and Path.cwd() != ROOT)):
        raise UserError(
            f"this process imports Python code from {Path.cwd()}, its current folder; start the command by its name, "
            "`cdp`, with PYTHONSAFEPATH=1 in the environment and without `python -E`"
        )


@cache
def code_digest() -> str:
    """sha256 over the source files of this project as this process imports it.

    Raises:
        UserError: If they are there no longer, as when their folder was replaced under a running process.
    """
    digest = hashlib.sha256()
    for top in ("pipeline", "stages", "storage"):
        files = sorted((ROOT / top).rglob("*.py"))
        if not files:
            raise UserError(f"found no source files in {ROOT / top}, from which this process runs; start it again")
        for file in files:
            digest.update(f"{file.relative_to(ROOT).as_posix()}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def check_code(expected: str) -> None:
    """Refuses to work for a command that runs other code of this project.

    Raises:
        UserError: If `code_digest` of the command is another one than here; names the folder here.
    """
    if (found := code_digest()) != expected:
        raise UserError(
            f"this worker on {socket.gethostname()} imports `stages` from {ROOT} with digest {found[:12]}, the "
            f"command's own has {expected[:12]}; install the same version of compodistill on every machine"
        )
