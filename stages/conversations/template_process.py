"""Renders chat templates in a process of their own, one for each process of ours that renders any.

A template is a program of whoever made the checkpoint: it may not end, recurse, or write until memory is gone.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from stages.conversations.render_templates import MAX_SECONDS

_SCRIPT = Path(__file__).absolute().with_name("render_templates.py")

Span = tuple[int, int]
"""First character and the one after the last."""


class RefusedByTemplate(Exception):
    """A template raised, or went beyond a bound of `render_templates`; with what was found."""


def render(
    template: str, messages: list[dict[str, Any]], special_tokens: dict[str, Any], **settings: bool
) -> tuple[str, list[Span]]:
    """The text that transformers' `render_jinja_template` gives, and the spans of its `{% generation %}` blocks.

    Args:
        template: the text of a chat template.
        messages: of one conversation.
        special_tokens: the names a template may use for them, and their texts.
        settings: `add_generation_prompt`, or `return_assistant_tokens_mask`: without it there are no spans.

    Raises:
        RefusedByTemplate: If there is no text.
    """
    return _RENDERER.render({**special_tokens, "chat_template": template, "conversations": [messages], **settings})


class _Renderer:
    """The process, started by the first rendering and again after one that ended it."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """In a fork: the process is its parent's."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def render(self, request: dict[str, Any]) -> tuple[str, list[Span]]:
        """What the process answers; a second one is asked if something else than its limit ended the first."""
        line = json.dumps(request) + "\n"
        with self._lock:
            reply = self._ask(line) or self._ask(line)
        if not reply:
            raise RefusedByTemplate("the process that renders it ended twice")
        if "refused" in (answer := json.loads(reply)):
            raise RefusedByTemplate(answer["refused"])
        return answer["text"], [(first, after) for first, after in answer["spans"]]

    def _ask(self, line: str) -> str | None:
        """The line it answers; None if something ended it."""
        process = self._process = self._process or _start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
            reply = process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if reply.endswith("\n"):
            return reply
        self._process = None
        if _end(process) == -signal.SIGPROF:
            raise RefusedByTemplate(f"it renders for more than {MAX_SECONDS} s of processor time")
        return None


def _start() -> subprocess.Popen[str]:
    process = subprocess.Popen(  # noqa: S603 - a file of ours
        [sys.executable, "-P", str(_SCRIPT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="ascii",
        cwd=_SCRIPT.anchor,  # our own may be gone: Ray removes those of jobs
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},  # each thread reserves memory
        start_new_session=True,  # an interrupt at the terminal is not for it: it ends when its input does
    )
    assert process.stdout is not None
    if not process.stdout.readline():
        raise RuntimeError(f"{_SCRIPT} ended with status {_end(process)} before it was ready; its output is above")
    return process


def _end(process: subprocess.Popen[str]) -> int:
    with suppress(BrokenPipeError), process:  # closing its pipes writes what is left in them
        process.kill()
    return process.wait()


_RENDERER = _Renderer()
os.register_at_fork(after_in_child=_RENDERER.forget)
