"""A `Progress` that keeps what it is told, and may do something at each step."""

from collections.abc import Callable
from typing import Any


class WatchedProgress:
    """Each task's steps as (name, done, total), and each message."""

    def __init__(self, at_step: Callable[[str, float], Any] = lambda name, done: None) -> None:
        """`at_step` is called with the task's name and what is done of it."""
        self.steps: list[tuple[str, float, float | None]] = []
        self.notes: list[str] = []
        self.messages: list[str] = []
        self.at_step = at_step

    def task(
        self, name: str, total: float | None = None, unit: str = "samples", *, detail: bool = False
    ) -> "WatchedTask":
        return WatchedTask(self, name, total)

    def message(self, text: str) -> None:
        self.messages.append(text)


class WatchedTask:
    def __init__(self, progress: WatchedProgress, name: str, total: float | None) -> None:
        self._progress, self._name, self._total, self._done = progress, name, total, 0.0

    def advance(self, amount: float = 1) -> None:
        self.update(done=self._done + amount)

    def update(
        self,
        *,
        done: float | None = None,
        total: float | None = None,
        note: str | None = None,
        rate: float | None = None,
    ) -> None:
        self._total = self._total if total is None else total
        if note is not None:
            self._progress.notes.append(note)
        if done is not None:
            self._done = done
            self._progress.steps.append((self._name, done, self._total))
            self._progress.at_step(self._name, done)

    def remove(self) -> None:
        pass
