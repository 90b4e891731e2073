"""What a teacher's time went into, counted by several threads at once."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BUSY = "busy "
"""Before the name of a GPU."""


class Timings:
    """Seconds by name; `forward` with at least one batch in the model, `waited` with none, `busy GPU` as it says."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._num_running = 0
        self._since: float | None = None

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Adds the time of the block."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._add(name, time.perf_counter() - started)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """A forward pass, maybe beside others; the time between passes, of whatever shards, was waited for the next.

        Before the first there is nothing to wait for, after the last nothing was waited.
        """
        self._count_running(1)
        try:
            yield
        finally:
            self._count_running(-1)

    def add_busy(self, gpu: "torch.device", seconds: float) -> None:
        """Adds time in which a GPU computed."""
        self._add(f"{BUSY}{gpu}", seconds)

    def _count_running(self, change: int) -> None:
        with self._lock:
            now = time.perf_counter()
            if self._since is not None:
                self._seconds["forward" if self._num_running else "waited"] += now - self._since
            self._num_running, self._since = self._num_running + change, now

    def seconds(self) -> dict[str, float]:
        """All of it so far."""
        with self._lock:
            return dict(self._seconds)

    def _add(self, name: str, seconds: float) -> None:
        with self._lock:
            self._seconds[name] += seconds


def waited_share(seconds: dict[str, float]) -> float | None:
    """Part of a teacher's time in which it stood idle though there was work; None before its first forward pass."""
    busy, waited = seconds.get("forward", 0.0), seconds.get("waited", 0.0)
    return waited / (busy + waited) if busy else None


def idle_shares(seconds: dict[str, float]) -> dict[str, float]:
    """Part of a teacher's time since its first forward pass in which a GPU had nothing to do, by the GPU's name.

    Empty without GPUs. A pass that failed counts as time, but not as work of a GPU.
    """
    total = seconds.get("forward", 0.0) + seconds.get("waited", 0.0)
    busy = {name.removeprefix(BUSY): time for name, time in seconds.items() if name.startswith(BUSY)}
    return {gpu: max(0.0, 1 - time / total) for gpu, time in sorted(busy.items())} if total else {}
