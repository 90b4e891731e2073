"""How long work says how far it is; who shows it, and how, is decided elsewhere (`pipeline.ui.progress`)."""

from typing import Any, Protocol


class ProgressTask(Protocol):
    """One piece of work that is shown: a bar on a terminal, a line now and then in a log."""

    def advance(self, amount: float = 1) -> None:
        """Adds to the amount done; negative where work is taken back."""

    def update(
        self,
        *,
        done: float | None = None,
        total: float | None = None,
        note: str | None = None,
        rate: float | None = None,
    ) -> None:
        """Sets what is given and leaves the rest.

        Args:
            done: amount done, in the task's unit.
            total: the whole amount.
            note: a few words behind the numbers, such as losses or bytes.
            rate: units a second, where the caller knows better than the time between two calls.
        """

    def remove(self) -> None:
        """Takes the task off the screen."""


class Progress(Protocol):
    """Where long work is shown."""

    def task(
        self, name: str, total: float | None = None, unit: str = "samples", *, detail: bool = False
    ) -> ProgressTask:
        """Begins to show a piece of work.

        Args:
            name: what is done, such as `pack`.
            total: the whole amount, None while it is not known.
            unit: what is counted, in the plural.
            detail: a part of another task: shown on a terminal, left out of a log.
        """

    def message(self, text: str) -> None:
        """Prints a line for the user, such as a note or a warning."""


class _Silent:
    def task(self, *_: Any, **__: Any) -> ProgressTask:
        return self

    def message(self, *_: Any, **__: Any) -> None:
        pass

    advance = update = remove = message


SILENT: Progress = _Silent()
"""Shows nothing: the default of every function that takes a `Progress`."""
