"""Turns Ctrl-C and SIGTERM into one exception that says how to go on."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

RESUME = "run the same command again to go on from here"
PASSED_ON_S = 2.0
SAVED_EXIT_CODE = 75
"""Exit code of a training that was asked to stop and saved a checkpoint (EX_TEMPFAIL: try again later)."""


class Interrupted(BaseException):
    """The process was asked to stop.

    Not a KeyboardInterrupt: on that one the command-line library ends the process before anything can be said.
    """

    def __init__(
        self, signal_number: int, message: str = f"interrupted; {RESUME}", exit_code: int | None = None
    ) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number if exit_code is None else exit_code
        """Unless given, what a shell expects of a process ended by this signal."""


@contextmanager
def raised_on(*signals: signal.Signals) -> Iterator[None]:
    """Ends the block with `Interrupted` on these signals; only the main thread may do this."""
    received: list[int] = []

    def interrupt(number: int, _: FrameType | None) -> NoReturn:
        received.append(number)
        # Ray's calls pass on no other exception of a handler.
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in signals}
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(received[-1] if received else signal.SIGINT) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def remembered(*signals: signal.Signals) -> Iterator[Callable[[], bool]]:
    """Only remembers these signals; the block asks whether there was one.

    A Ctrl-C ends the block at once if it comes a while after the first signal. Earlier it may be the same one:
    launchers pass signals on to processes that had them already.
    """
    received: list[float] = []

    def remember(number: int, _: FrameType | None) -> None:
        received.append(time.monotonic())
        if number == signal.SIGINT and received[-1] > received[0] + PASSED_ON_S:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, remember) for number in signals}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
