"""A `Progress` that records what it is told, and may do something at each step."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class RecordedTask:
    """One task and what it was told last."""

    name: str
    total: float | None
    unit: str
    detail: bool
    progress: "RecordedProgress"
    done: float = 0
    note: str = ""
    rate: float = 0
    removed: bool = False

    def advance(self, amount: float = 1) -> None:
        self.update(done=self.done + amount)

    def update(
        self,
        *,
        done: float | None = None,
        total: float | None = None,
        note: str | None = None,
        rate: float | None = None,
    ) -> None:
        for name, value in (("done", done), ("total", total), ("note", note), ("rate", rate)):
            if value is not None:
                setattr(self, name, value)
        assert self.total is None or 0 <= self.done <= self.total
        if note is not None:
            self.progress.notes.append(note)
        if done is not None:
            self.progress.steps.append((self.name, done, self.total))
            self.progress.at_step(self.name, done)

    def remove(self) -> None:
        self.removed = True


@dataclass
class RecordedProgress:
    """All tasks, steps, notes and messages, in order."""

    at_step: Callable[[str, float], Any] = lambda name, done: None
    """Called with the task's name and what is done of it."""
    tasks: list[RecordedTask] = field(default_factory=list)
    steps: list[tuple[str, float, float | None]] = field(default_factory=list)
    """Task, done, total."""
    notes: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def task(
        self, name: str, total: float | None = None, unit: str = "samples", *, detail: bool = False
    ) -> RecordedTask:
        self.tasks.append(RecordedTask(name, total, unit, detail, self))
        return self.tasks[-1]

    def message(self, text: str) -> None:
        self.messages.append(text)

    def named(self, name: str) -> RecordedTask:
        """The only task of that name."""
        (found,) = [task for task in self.tasks if task.name == name]
        return found
