"""Where commands write: results to standard output, all else to standard error; one process of a group writes."""

import os
import sys

from rich.console import Console

is_main_process = os.environ.get("RANK", "0") == "0"
"""False in all but one of the processes that torchrun or accelerate starts: those stay silent."""

results = Console(quiet=not is_main_process)
"""What a command was run for, on standard output."""

messages = Console(stderr=True, quiet=not is_main_process)
"""Progress and notes, on standard error."""


def say(text: str) -> None:
    """Writes one message to standard error, from any process."""
    print(text, file=sys.stderr)
