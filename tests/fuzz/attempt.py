"""One attempt: a reader gets a spoiled folder, and must end soon, in little memory, with success or a named error."""

import re
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from storage.errors import UserError
from storage.printable import printable

LIMIT_S = 10.0
"""Seconds of processor time, and five times as many of waiting."""
MEMORY_BYTES = 2**30
"""Beyond what the process holds before; stacks of threads count."""
MAX_MESSAGE_CHARS = 20_000

Mutant = Callable[[Path], None]
"""Spoils a copy of the sound folder."""


@dataclass(frozen=True)
class Target:
    """What is read, and how it is spoiled."""

    name: str
    make: Callable[[Path], None]
    """Writes the sound folder."""
    read: Callable[[Path], Any]
    """Reads all of a folder; what it gives is compared with that of the sound one, unless it is None."""
    mutants: Callable[[Path], st.SearchStrategy[Mutant]]
    """From the sound folder."""


@dataclass(frozen=True)
class Fault:
    """A reader that did not keep the rule."""

    kind: str
    """Equal for the same fault in another input: the exception and where it was raised."""
    detail: str


class TooLong(BaseException):
    """The time is over; no reader catches it."""


@contextmanager
def limits() -> Iterator[None]:
    """Ends what takes too long, and refuses memory above the limit."""

    def too_long(*_: object) -> None:
        raise TooLong(f"more than {LIMIT_S:g} s of processor time")

    before = resource.getrlimit(resource.RLIMIT_DATA)
    handlers = {number: signal.signal(number, too_long) for number in (signal.SIGALRM, signal.SIGPROF)}
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + MEMORY_BYTES, before[1]))
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    signal.setitimer(signal.ITIMER_REAL, 5 * LIMIT_S)
    started = time.process_time()
    try:
        yield
        # What Python cannot interrupt comes here late.
        if time.process_time() - started > LIMIT_S:
            too_long()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_DATA, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def attempt(target: Target, folder: Path, sound: Any) -> tuple[bool, Fault | None]:
    """Whether the folder was accepted, and what is wrong with how it was read."""
    try:
        with limits():
            found = target.read(folder)
    except UserError as error:
        return False, _fault_of_message(str(error), folder)
    except Exception as error:
        return False, Fault(_kind(error), "".join(traceback.format_exception(error))[-20_000:])
    except TooLong as error:
        return False, Fault(_kind(error), "".join(traceback.format_exception(error))[-20_000:])
    if found is not None and found != sound:
        return True, Fault("accepted, with other values", f"sound: {sound!r:.2000}\nfound: {found!r:.2000}")
    return True, None


def _fault_of_message(text: str, folder: Path) -> Fault | None:
    short = re.sub(r"'[^']*'", "'...'", text.replace(str(folder), ""))[:40]
    if len(text) > MAX_MESSAGE_CHARS:
        return Fault(f"a message of much text: {short}", text[:MAX_MESSAGE_CHARS])
    if str(folder) not in text:
        return Fault(f"a message without the place: {short}", text)
    printable(text).encode()
    return None


def _kind(error: BaseException) -> str:
    """The exception and the last line of the product on the way to it."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [
        frame
        for frame in frames
        if f"{Path(__file__).parents[2]}/" in frame.filename and "/tests/" not in frame.filename
    ]
    where = f"{Path(ours[-1].filename).stem}.{ours[-1].name}" if ours else "outside"
    return f"{type(error).__name__} in {where}"


def _data_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmData: memory is limited on Linux only")
