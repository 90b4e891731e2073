"""Chat templates: where a processor's is found, those that come with the package, and how one renders messages."""

import re
from pathlib import Path
from typing import Any

from stages.conversations import template_process
from stages.conversations.messages import Message, text_part
from stages.conversations.template_process import RefusedByTemplate, Span
from stages.unusable_sample import UnusableSample
from storage.errors import CorruptData, UserError
from storage.regular_files import is_regular, read_regular

FOLDER = Path(__file__).parent / "templates"
"""`llava-1.5.jinja` is the format LLaVA-1.5 was trained on (conversation `vicuna_v1` of its code), with the end token
after each answer that the published checkpoint's own template leaves out."""

_MAX_BYTES = 2**20
"""Largest template; real ones have kilobytes."""


def chat_template(processor: Any) -> str:
    """The template that `processor.apply_chat_template` uses when none is named.

    Raises:
        UserError: If there is none.
    """
    template = processor.chat_template or processor.tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        name = type(processor).__name__
        raise UserError(f"{name} has no (default) chat template; save one with the checkpoint (chat_template.jinja)")
    return str(template)


def read_template(name: str) -> str:
    """A chat template: the text of a jinja file, or of one that comes with the package, by its bare name.

    Raises:
        UserError: If neither exists, or the file cannot be read.
    """
    bundled = {file.stem: file for file in sorted(FOLDER.glob("*.jinja"))}
    path = Path(name) if is_regular(Path(name)) else bundled.get(name, Path(name))
    try:
        return read_regular(path, _MAX_BYTES).decode()
    except (CorruptData, OSError, UnicodeDecodeError) as error:
        others = f"one of the templates that come with the package: {', '.join(bundled)}"
        raise UserError(
            f"chat template {name} cannot be read: {error}; give a jinja file's path, or {others}"
        ) from error


class ChatTemplate:
    """The chat template of a processor; several threads may use it.

    Raises:
        UserError: If there is none, or it is one for turns that are plain strings.
    """

    def __init__(self, processor: Any) -> None:
        self._text = chat_template(processor)
        self._special_tokens = processor.tokenizer.special_tokens_map
        self.marks_answers = re.search(r"\{%-?\s*generation\s*-?%\}", self._text) is not None
        self._check_parts()

    def render(self, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
        """The text that `processor.apply_chat_template` gives.

        Raises:
            UnusableSample: If the template raises.
        """
        return self._render(messages, add_generation_prompt=add_generation_prompt)[0]

    def render_marked(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """The text, and the spans of the template's `{% generation %}` blocks.

        Raises:
            UnusableSample: If the template raises.
        """
        return self._render(messages, return_assistant_tokens_mask=True)

    def _render(self, messages: list[Message], **settings: bool) -> tuple[str, list[Span]]:
        try:
            return template_process.render(self._text, messages, self._special_tokens, **settings)
        except RefusedByTemplate as error:
            raise UnusableSample("refused_by_template", str(error)) from error

    def _check_parts(self) -> None:
        """A template for plain strings would print the parts of a turn as Python lists, without an error."""
        trial = {role: f"trial of {role}" for role in ("user", "assistant")}
        try:
            text = self.render([{"role": role, "content": [text_part(words)]} for role, words in trial.items()])
        except UnusableSample as error:
            raise UserError(f"the chat template cannot render a question and its answer: {error.detail}") from error
        if not all(words in text for words in trial.values()) or "'text'" in text:
            raise UserError(
                f"the chat template renders a turn made of parts as {text!r:.200}; it must go through "
                "message['content'] and render parts of type 'text' and 'image'"
            )
