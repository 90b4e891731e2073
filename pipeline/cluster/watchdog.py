"""Ends a worker's process in which nothing of Python runs any more, so that its task is tried elsewhere.

The tokenizer library holds Python's lock while it works, and a pattern of a tokenizer.json may work for days on one
text. No thread of Python can end that; faulthandler's is none.
"""

import faulthandler
import time
from threading import Thread

STUCK_S = 300.0
"""Much longer than any call that holds the lock takes."""


def end_when_stuck(limit_s: float = STUCK_S) -> None:
    """From here on the process ends with status 1 once no thread of Python has run for so long; stderr says where."""
    Thread(target=_say_alive, args=(limit_s,), daemon=True).start()


def _say_alive(limit_s: float) -> None:
    while True:
        faulthandler.dump_traceback_later(limit_s, exit=True)
        time.sleep(limit_s / 10)
