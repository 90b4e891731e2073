"""What a teacher's time went into, counted by several threads at once."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Timings:
    """Seconds by name; `forward` and `waited` are those of the model, which runs one batch at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._idle_since: float | None = None

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
        """A forward pass; the time since the one before it, whatever shard that was of, was waited for this one.

        Before the first there is nothing to wait for, after the last nothing was waited.
        """
        if self._idle_since is not None:
            self._add("waited", time.perf_counter() - self._idle_since)
        try:
            with self.measured("forward"):
                yield
        finally:
            self._idle_since = time.perf_counter()

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
