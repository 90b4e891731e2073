"""Calls a test back at each training step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AtEachStep:
    """A `Progress` that calls `back` with a stage and the number of the step that it finished."""

    back: Callable[[str, int], object]
    stage: str = ""

    def task(
        self, name: str, total: float | None = None, unit: str = "samples", *, detail: bool = False
    ) -> "AtEachStep":
        assert unit == "steps"
        return AtEachStep(self.back, name)

    def advance(self, amount: float = 1) -> None:
        raise NotImplementedError

    def update(self, *, done: float | None = None, note: str | None = None, **_: Any) -> None:
        # Where a stage goes on from is said without a note, how far a validation is without a step.
        if note is not None and done is not None:
            self.back(self.stage, int(done))

    def remove(self) -> None:
        raise NotImplementedError

    def message(self, text: str) -> None:
        pass
