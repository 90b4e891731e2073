"""What the driver and the processes of a run tell each other: a plain object, which the backend puts in an actor."""

import time
from collections.abc import Callable
from typing import Any

ASK_S = 1.0


class Mailbox:
    """Keeps the messages of the processes until the driver takes them, and what the driver asks of the processes."""

    def __init__(self) -> None:
        self._messages: list[tuple[Any, ...]] = []
        self._positions: dict[int, int] = {}
        self._asked_to_stop = False
        self._error: Exception | None = None

    def put(self, *message: Any) -> None:
        """Adds a message to the driver."""
        self._messages.append(message)

    def take(self) -> list[tuple[Any, ...]]:
        """Gives all messages since the last call, in the order they came."""
        messages, self._messages = self._messages, []
        return messages

    def mark(self, attempt: int, position: int) -> None:
        """Keeps the position that an attempt has reached, for when its process dies."""
        self._positions[attempt] = position

    def position(self, attempt: int) -> int | None:
        """Gives what `mark` was told last."""
        return self._positions.get(attempt)

    def report_error(self, error: Exception) -> None:
        """Keeps an error that would come again in every attempt; the first one only."""
        self._error = self._error or error

    def error(self) -> Exception | None:
        """Gives that error."""
        return self._error

    def ask_to_stop(self) -> None:
        """Asks all processes to stop."""
        self._asked_to_stop = True

    def is_asked_to_stop(self) -> bool:
        """Says whether the driver asked."""
        return self._asked_to_stop


class Throttled:
    """Asks another process a question once a second at most; in between, the answer is the last one."""

    def __init__(self, question: Callable[[], bool]) -> None:
        self._question, self._answer, self._next = question, False, 0.0

    def __call__(self) -> bool:
        """Gives the answer."""
        if (now := time.monotonic()) > self._next:
            self._answer, self._next = self._question(), now + ASK_S
        return self._answer
