"""Ctrl-C and SIGTERM as one exception that says how to go on."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

RESUME = "run the same command again to go on from here"


class Interrupted(BaseException):
    """The process was asked to stop.

    Not a KeyboardInterrupt: on that one the command-line library ends the process before anything can be said.
    """

    def __init__(self, signal_number: int, message: str = f"interrupted; {RESUME}") -> None:
        super().__init__(message)
        self.signal_number = signal_number

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process ended by this signal."""
        return 128 + self.signal_number


@contextmanager
def raised_on(*signals: signal.Signals) -> Iterator[None]:
    """These signals end the block with `Interrupted`; only the main thread may do this."""
    received: list[int] = []

    def interrupt(number: int, _: FrameType | None) -> NoReturn:
        received.append(number)
        # Of all exceptions of a handler, ray's calls pass on this one alone.
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in signals}
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(received[-1] if received else signal.SIGINT) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
