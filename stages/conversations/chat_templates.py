"""Chat templates: where a processor's is found, those that come with the package, and how one renders messages."""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
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
after each answer that the published checkpoint's own template leaves out. `chatml.jinja` is that of Qwen and SmolLM,
without a system turn of its own. `llama-3.jinja` is that of Llama 3. `mistral.jinja` is that of Mistral 7B Instruct 0.1
and 0.2, and of LLaVA-1.6 on them."""

_IMAGE = "<image>\\n"
"""What stands for an image in the templates of that folder, as jinja writes it."""
_PLACEHOLDERS = {"<|image_pad|>": "<|vision_start|><|image_pad|><|vision_end|>"}
"""Image token -> what checkpoints were trained with around it, where that is not a line of its own."""

_TRIAL = {"user": "trial of user", "assistant": "trial of assistant"}
_FLATTEN = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set turn = namespace(text='') -%}
{%- if message['content'] is string -%}{%- set turn.text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{%- set turn.text = turn.text + PLACEHOLDER -%}
{%- else -%}{%- set turn.text = turn.text + part['text'] -%}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': turn.text}] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""
"""Goes before a template that expects the content of a turn as a plain string. So the template that is saved with a
model renders parts wherever it is used."""

_MAX_BYTES = 2**20
"""Largest template; real ones have kilobytes."""


def checkpoint_of(processor: Any) -> str:
    """The folder that a processor was loaded from; its class, if it was made here."""
    return getattr(processor.tokenizer, "name_or_path", "") or type(processor).__name__


def chat_template(processor: Any) -> str:
    """The template that `processor.apply_chat_template` uses when none is named.

    Raises:
        UserError: If there is none.
    """
    template = processor.chat_template or processor.tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        found = f"{checkpoint_of(processor)} has no (default) chat template"
        raise UserError(f"{found}; save one with the checkpoint (chat_template.jinja)")
    return str(template)


def image_text(processor: Any) -> str:
    """What stands for an image in the text of a turn, as the family's checkpoints were trained."""
    token: str = getattr(processor, "image_token", None) or "<image>"
    return _PLACEHOLDERS.get(token, f"{token}\n")


def read_template(name: str, placeholder: str = "<image>\n") -> str:
    """A chat template: the text of a jinja file, or of one that comes with the package, by its bare name.

    The latter writes `placeholder` for an image.

    Raises:
        UserError: If neither exists, or the file cannot be read.
    """
    bundled = {file.stem: file for file in sorted(FOLDER.glob("*.jinja"))}
    path = Path(name) if is_regular(Path(name)) else bundled.get(name, Path(name))
    try:
        text = read_regular(path, _MAX_BYTES).decode()
    except (CorruptData, OSError, UnicodeDecodeError) as error:
        others = f"one of the templates that come with the package: {', '.join(bundled)}"
        raise UserError(
            f"chat template {name} cannot be read: {error}; give a jinja file's path, or {others}"
        ) from error
    return text.replace(_IMAGE, repr(placeholder)[1:-1]) if path.parent == FOLDER else text


class ChatTemplate:
    """The chat template of a processor; several threads may use it.

    A refusal calls it by `name`, such as the file it was read from; None is the checkpoint's own one.

    Attributes:
        text: The template as it renders turns made of parts.
        trials: What it makes of a question about an image, or without one, and its answer; and of longer conversations
            with and without a system turn, as far as it takes them.
        after_answer: What it writes after the answer of the first.

    Raises:
        UserError: If there is none, or it renders no conversation.
    """

    def __init__(self, processor: Any, name: str | None = None) -> None:
        self._special_tokens = processor.tokenizer.special_tokens_map
        own, image = chat_template(processor), getattr(processor, "image_token", None)
        found = image and with_image_parts(own, self._special_tokens, image, image_text(processor))
        if not found:
            # It may still do for samples without images; those with one are refused by their number of placeholders.
            name = name or f"that of {checkpoint_of(processor)}"
            found = _without_images(own, self._special_tokens, image_text(processor), name)
        self.text, trial = found
        self.trials = [trial, *_longer_trials(self.text, self._special_tokens)]
        self.after_answer = trial.partition(_TRIAL["assistant"])[2]
        self.marks_answers = re.search(r"\{%-?\s*generation\s*-?%\}", self.text) is not None

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
            return template_process.render(self.text, messages, self._special_tokens, **settings)
        except RefusedByTemplate as error:
            raise UnusableSample("refused_by_template", str(error)) from error


def with_image_parts(
    template: str, special_tokens: Mapping[str, Any], image_token: str, placeholder: str
) -> tuple[str, str] | None:
    """The template if it renders turns made of parts, else the same for turns that are strings.

    A template of a language model expects strings. It then gets each turn as one, with `placeholder` for an image.

    Returns:
        The template and what it makes of a question about an image and its answer; None if neither way writes one
        image token.
    """
    for text in (template, _for_strings(template, placeholder)):
        with suppress(RefusedByTemplate):
            trial = _trial(text, special_tokens, [{"type": "image"}])
            if trial.count(image_token) == 1:
                return text, trial
    return None


def _for_strings(template: str, placeholder: str) -> str:
    return _FLATTEN.replace("PLACEHOLDER", repr(placeholder)) + template


def _without_images(template: str, special_tokens: Mapping[str, Any], placeholder: str, name: str) -> tuple[str, str]:
    """As `with_image_parts`, for conversations without images; `name` says which template it is.

    Raises:
        UserError: If neither way renders one, with what each was refused for.
    """
    refused: dict[str, None] = {}
    for text in (template, _for_strings(template, placeholder)):
        try:
            return text, _trial(text, special_tokens, [])
        except RefusedByTemplate as error:
            refused[str(error)] = None
    of_strings, *of_parts = reversed(refused)
    found = f"{of_strings}; with turns made of parts: {of_parts[0]}" if of_parts else of_strings
    raise UserError(f"the chat template ({name}) cannot render a question and its answer: {found}")


def _longer_trials(template: str, special_tokens: Mapping[str, Any]) -> Iterator[str]:
    """What a template makes of three questions and answers, as some write the first, middle and last differently."""
    dialogue = [{"role": role, "content": [text_part(words)]} for role, words in _TRIAL.items()] * 3
    system = {"role": "system", "content": [text_part("trial of system")]}
    for messages, asks in ((dialogue, False), ([system, *dialogue], False), ([system, *dialogue[:-1]], True)):
        with suppress(RefusedByTemplate):
            yield template_process.render(template, messages, dict(special_tokens), add_generation_prompt=asks)[0]


def _trial(template: str, special_tokens: Mapping[str, Any], images: list[dict[str, str]]) -> str:
    """What a template makes of a question, with these parts before it, and its answer.

    Raises:
        RefusedByTemplate: If it raises, or leaves the words out. One for plain strings prints parts as Python lists.
    """
    messages = [{"role": role, "content": [text_part(words)]} for role, words in _TRIAL.items()]
    messages[0]["content"] = [*images, text_part(_TRIAL["user"])]
    text, _ = template_process.render(template, messages, dict(special_tokens))
    if not all(words in text for words in _TRIAL.values()) or "'text'" in text:
        raise RefusedByTemplate(
            f"it renders a turn made of parts as {text!r:.200}; it must go through message['content'] and render "
            "parts of type 'text' and 'image', or take message['content'] as a string"
        )
    return text
