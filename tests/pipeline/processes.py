"""Running the command line, here or in processes of its own, and killing them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.cli import app

PATIENCE_S = 240


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


def kill_when(process: "subprocess.Popen[bytes]", condition: Callable[[], bool]) -> bool:
    """Kills the process (SIGKILL) at the first moment `condition` holds; False when it ended before."""
    try:
        return runs_until(process, condition)
    finally:
        kill(process)


def runs_until(process: "subprocess.Popen[bytes]", condition: Callable[[], bool]) -> bool:
    """Waits until `condition` holds; False when the process ended before."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.003)
    return process.poll() is None


def kill(process: "subprocess.Popen[bytes]") -> None:
    """SIGKILL to the process and its children, by their numbers, and waits until they are gone."""
    children = descendants(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(map(is_alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in filter(is_alive, children):
        os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Numbers of all children of a process, and theirs."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *descendants(child)]
    return found


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def wait_until_dead(pid: int, timeout_s: float = 20) -> bool:
    """Whether the process ends within the time."""
    deadline = time.monotonic() + timeout_s
    while is_alive(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def tree(folder: Path, *parts: str) -> dict[str, bytes]:
    """Every file's bytes by relative path; with `parts`, only below those."""
    names = (path for path in sorted(folder.rglob("*")) if path.is_file())
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in names}
    return {name: data for name, data in files.items() if not parts or name.startswith(parts)}


def _command(arguments: tuple[object, ...]) -> list[str]:
    return [sys.executable, "-m", "pipeline.cli.app", *map(str, arguments)]


def _environment() -> dict[str, str]:
    return {**os.environ, "COLUMNS": "200", "TOKENIZERS_PARALLELISM": "false"}
