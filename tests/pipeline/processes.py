"""Running the command line, here or in processes of its own."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.cli import app
from tests.processes import PATIENCE_S


@dataclass(frozen=True)
class Ended:
    """What a finished command left."""

    code: int
    out: str
    err: str


def cdp(*arguments: object, cwd: Path | None = None) -> Ended:
    """Runs `cdp` to its end."""
    done = subprocess.run(
        _command(arguments),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=_environment(),
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def run_here(*arguments: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ended:
    """What `cdp` does and says, without a new process."""
    monkeypatch.setattr(sys, "argv", ["cdp", *map(str, arguments)])
    try:
        app.main()
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    captured = capsys.readouterr()
    return Ended(code, captured.out, captured.err)


def start_cdp(*arguments: object, err: Path | None = None) -> "subprocess.Popen[bytes]":
    """Starts `cdp` as the head of a process group; its standard error goes to the file `err`."""
    with (err or Path(os.devnull)).open("wb") as stderr:
        return subprocess.Popen(
            _command(arguments),
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=_environment(),
            start_new_session=True,
        )


def tree(folder: Path, *parts: str) -> dict[str, bytes]:
    """Every file's bytes by relative path; with `parts`, only below those."""
    names = (path for path in sorted(folder.rglob("*")) if path.is_file())
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in names}
    return {name: data for name, data in files.items() if not parts or name.startswith(parts)}


def _command(arguments: tuple[object, ...]) -> list[str]:
    return [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]


def _environment() -> dict[str, str]:
    return {**os.environ, "COLUMNS": "200", "TOKENIZERS_PARALLELISM": "false"}
