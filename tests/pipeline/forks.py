"""A child of this process that runs one function, and may be killed meanwhile."""

import json
import os
import select
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PATIENCE_S = 120


@dataclass(frozen=True)
class Ended:
    """How a forked process ended: with a result, or by SIGKILL after it may have said something."""

    killed: bool
    said: str
    result: Any = None


class Forked:
    """A child of this process that runs one function."""

    def __init__(self, function: Callable[[Callable[[str], None]], Any]) -> None:
        """Starts it; the function gets one to say something with before it dies, and returns what JSON can hold."""
        self._reader, writer = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                os.close(self._reader)
                result = function(lambda text: _write(writer, text))
                _write(writer, json.dumps(result))
                code = 0
            except BaseException:
                _write(writer, traceback.format_exc())
            finally:
                os._exit(code)
        os.close(writer)

    def kill_after(self, seconds: float) -> None:
        """SIGKILL, unless it ends before."""
        if not select.select([self._reader], [], [], seconds)[0]:
            os.kill(self.pid, signal.SIGKILL)

    def end(self) -> Ended:
        """Waits for the end, at most `PATIENCE_S`.

        Raises:
            AssertionError: it raised, or was not done in time.
        """
        self.kill_after(PATIENCE_S)
        with os.fdopen(self._reader, "rb") as pipe:
            said = pipe.read().decode()
        _, status = os.waitpid(self.pid, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL, f"ended by signal {os.WTERMSIG(status)}"
            return Ended(True, said)
        assert os.WEXITSTATUS(status) == 0, said
        return Ended(False, "", json.loads(said))


def _write(descriptor: int, text: str) -> None:
    data = text.encode()
    while data:
        data = data[os.write(descriptor, data) :]
