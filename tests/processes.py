"""Watching processes and killing them; imports nothing of the product, so that a process of Ray begins quickly."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE_S = 400
"""How long a test waits for what another process does."""


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
