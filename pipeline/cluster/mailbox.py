"""What the processes of a run and its driver tell each other: a plain object, which whoever runs them holds."""

import time
from collections.abc import Callable
from typing import Any

ASK_S = 1.0


class Mailbox:
    """Where processes drop what they have to report until the driver takes it, and find what it asks of them."""

    def __init__(self) -> None:
        self._letters: list[tuple[Any, ...]] = []
        self._places: dict[int, int] = {}
        self._asked_to_stop = False
        self._mistake: Exception | None = None

    def put(self, *letter: Any) -> None:
        """Something to report."""
        self._letters.append(letter)

    def take(self) -> list[tuple[Any, ...]]:
        """All letters since the last call, in the order they came."""
        letters, self._letters = self._letters, []
        return letters

    def at(self, number: int, place: int) -> None:
        """How far try `number` of a task has come, for when its process dies."""
        self._places[number] = place

    def place(self, number: int) -> int | None:
        """What `at` said last."""
        return self._places.get(number)

    def report_mistake(self, error: Exception) -> None:
        """What no further try would mend; the first one is kept."""
        self._mistake = self._mistake or error

    def has_mistake(self) -> bool:
        """Whether there is one."""
        return self._mistake is not None

    def mistake(self) -> Exception | None:
        """The first one."""
        return self._mistake

    def ask_to_stop(self) -> None:
        """From the driver, to all processes."""
        self._asked_to_stop = True

    def is_asked_to_stop(self) -> bool:
        """Whether it asked."""
        return self._asked_to_stop


class Throttled:
    """A question to another process that is asked once a second at most; between, the answer is the last one."""

    def __init__(self, question: Callable[[], bool]) -> None:
        self._question, self._answer, self._next = question, False, 0.0

    def __call__(self) -> bool:
        """The answer."""
        if (now := time.monotonic()) > self._next:
            self._answer, self._next = self._question(), now + ASK_S
        return self._answer
