"""A `Progress` that records what it is told."""

from dataclasses import dataclass, field


@dataclass
class RecordedTask:
    """One task and what it was told last."""

    name: str
    total: float | None
    unit: str
    detail: bool
    done: float = 0
    note: str = ""
    rate: float = 0
    removed: bool = False

    def advance(self, amount: float = 1) -> None:
        self.done += amount

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

    def remove(self) -> None:
        self.removed = True


@dataclass
class RecordedProgress:
    """All tasks and messages, in order."""

    tasks: list[RecordedTask] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def task(
        self, name: str, total: float | None = None, unit: str = "samples", *, detail: bool = False
    ) -> RecordedTask:
        self.tasks.append(RecordedTask(name, total, unit, detail))
        return self.tasks[-1]

    def message(self, text: str) -> None:
        self.messages.append(text)

    def named(self, name: str) -> RecordedTask:
        """The only task of that name."""
        (found,) = [task for task in self.tasks if task.name == name]
        return found
