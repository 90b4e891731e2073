"""A `Progress` with one task, that keeps each amount by which it advances."""

from typing import Any


class Advances:
    """Progress and task in one."""

    def __init__(self) -> None:
        self.titles: list[str] = []
        self.amounts: list[float] = []

    def task(self, name: str, total: float | None = None, unit: str = "samples", *, detail: bool = False) -> "Advances":
        self.titles.append(f"{name}: {total} {unit}")
        return self

    def advance(self, amount: float = 1) -> None:
        self.amounts.append(amount)

    def update(self, **_given: Any) -> None:
        pass

    def remove(self) -> None:
        pass

    def message(self, text: str) -> None:
        pass
