"""Turns a LLaVA conversation and its images into the tokens the teacher sees, and marks the answers in them.

The chat template of the processor decides the text. Where the answers lie in it is read from the template's
`{% generation %}` blocks or, for the many templates without one, from renderings of the conversation's
prefixes. Either way an answer is a span of characters, which the tokenizer's offsets carry over to tokens.

Shape letters: T tokens, N image tokens.
"""

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import jinja2
import torch
from PIL import Image
from torch import Tensor
from transformers.utils.chat_template_utils import render_jinja_template

from storage.errors import UserError

PLACEHOLDER: Final = "<image>"
"""The image's place in a LLaVA conversation, whatever the processor's own image token is."""

ConversationFault = Literal[
    "image_beyond_max_length",
    "image_count_mismatch",
    "malformed_conversation",
    "no_answer",
    "no_answer_within_max_length",
    "prompt_beyond_max_length",
    "refused_by_processor",
    "refused_by_template",
    "template_not_prefix_stable",
]

_ROLES: Final = {"human": "user", "gpt": "assistant", "system": "system"}
_TEXT_KEYS: Final = frozenset(
    {
        "attention_mask",
        "input_ids",
        "mm_token_type_ids",
        "offset_mapping",
        "text_replacement_offsets",  # InternVL's processor makes an empty tensor of none
        "token_type_ids",
    }
)

# The library collects the spans of generation blocks in the compiled template, which all threads share.
_RENDERING = threading.Lock()

Message = dict[str, Any]
Span = tuple[int, int]


class UnusableConversation(UserError):
    """A conversation that is not used; `reason` is the ledger's word for it, `detail` says what was found."""

    def __init__(self, reason: ConversationFault, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason: ConversationFault = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True)
class EncodedConversation:
    """One conversation as a model reads it, without a batch dimension."""

    token_ids: Tensor
    """`[T]` int64, the image placeholder expanded to one token a feature."""
    answer_mask: Tensor
    """`[T]` bool: token t is part of an answer, the end token included; it is predicted at t-1."""
    pixel_inputs: dict[str, Tensor]
    """The image processor's outputs: `pixel_values`, for some families sizes too. Empty without images."""
    image_positions: Tensor
    """`[N]` int64, increasing: where `token_ids` holds the image token."""


class ConversationEncoder:
    """Encodes conversations for one processor; may be used by several threads.

    Args:
        processor: a Hugging Face processor with a fast tokenizer and a chat template.
        image_token_id: `config.image_token_id` of the model.
        max_length: tokens kept of a conversation, image tokens included.

    Raises:
        UserError: the processor has no chat template or a slow tokenizer.
    """

    def __init__(self, processor: Any, image_token_id: int, max_length: int) -> None:
        if not processor.tokenizer.is_fast:
            raise UserError(
                f"{type(processor.tokenizer).__name__} is a slow tokenizer, which cannot tell the "
                "characters of a token; convert it to a fast one (tokenizer.json) first"
            )
        self.processor = processor
        self.image_token_id = image_token_id
        self.max_length = max_length
        self._image_token: str = processor.tokenizer.convert_ids_to_tokens(image_token_id)
        self._template = chat_template(processor)
        self._has_generation_blocks = re.search(r"\{%-?\s*generation\s*-?%\}", self._template) is not None
        self._check_template()

    def encode(self, conversations: Sequence[Mapping[str, str]], images: Sequence[Image.Image]) -> EncodedConversation:
        """The turns (`from`, `value`) of one sample as tokens, cut at `max_length`.

        The cut may fall inside an answer, of which the tokens before it are kept; it may not fall before or
        inside the image tokens, nor before the first answer token. Text never becomes an image token; other
        special tokens written in it are read as such, as by the processor's own template.

        Raises:
            UnusableConversation: with its reason.
        """
        messages = _messages(conversations, len(images))
        if not any(message["role"] == "assistant" for message in messages):
            raise UnusableConversation("no_answer", "no turn is from 'gpt'")
        text, spans = self._render_with_answers(messages)
        encoded = self._tokenize(text, spans, images)
        return self._truncate(encoded)

    def encode_pair(self, question: str, answer: str, images: Sequence[Image.Image]) -> EncodedConversation:
        """One question and its answer; images the question does not place come before it."""
        turns = [
            {"from": "human", "value": _place_images(question, len(images))},
            {"from": "gpt", "value": answer},
        ]
        return self.encode(turns, images)

    def encode_prompt(
        self, question: str, images: Sequence[Image.Image], earlier: Sequence[Mapping[str, str]] = ()
    ) -> EncodedConversation:
        """A question up to where the model's answer begins; `answer_mask` is all False.

        Args:
            question: the last turn.
            images: of all turns.
            earlier: turns before it (`from`, `value`), which then place the images.

        Raises:
            UnusableConversation: with its reason; a prompt is never cut.
        """
        turn = {"from": "human", "value": question if earlier else _place_images(question, len(images))}
        messages = _messages([*earlier, turn], len(images))
        text = self._render(messages, add_generation_prompt=True)
        encoded = self._tokenize(text, [], images)
        if len(encoded.token_ids) > self.max_length:
            raise UnusableConversation(
                "prompt_beyond_max_length",
                f"{len(encoded.token_ids)} tokens, at most {self.max_length} fit; raise max_length",
            )
        return encoded

    def _check_template(self) -> None:
        """A template for plain strings would print the parts of a turn as Python lists, without an error."""
        probe = [{"role": role, "content": [_text(f"probe of {role}")]} for role in ("user", "assistant")]
        text = self._render(probe)
        # Undoes truncation and padding saved in tokenizer.json: a change of them while threads encode raises.
        self.processor.tokenizer(text)
        if not all(f"probe of {role}" in text for role in ("user", "assistant")) or "'text'" in text:
            raise UserError(
                f"the chat template renders a turn made of parts as {text!r:.200}; it must go through "
                "message['content'] and render parts of type 'text' and 'image'"
            )

    def _render(self, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
        return self._render_tracked(messages, add_generation_prompt=add_generation_prompt)[0]

    def _render_tracked(
        self, messages: list[Message], *, add_generation_prompt: bool = False, track: bool = False
    ) -> tuple[str, list[Span]]:
        """What `processor.apply_chat_template` renders; with `track`, also the spans of generation blocks."""
        try:
            with _RENDERING:
                texts, spans = render_jinja_template(
                    conversations=[messages],
                    chat_template=self._template,
                    return_assistant_tokens_mask=track,
                    add_generation_prompt=add_generation_prompt,
                    **self.processor.tokenizer.special_tokens_map,
                )
        except (jinja2.TemplateError, TypeError) as error:
            raise UnusableConversation("refused_by_template", str(error)) from error
        return texts[0], spans[0] if track else []

    def _render_with_answers(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """The text and the answers in it, less white space at their ends: in many tokenizers the space before a word is
        a part of it, and that word is the next turn's.
        """
        text, spans = (
            self._render_tracked(messages, track=True)
            if self._has_generation_blocks
            else self._render_by_prefixes(messages)
        )
        ends = [len(text[:end].rstrip()) for _, end in spans]
        return text, [(start, end) for (start, _), end in zip(spans, ends, strict=True) if start < end]

    def _render_by_prefixes(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """An answer spans from the end of its prompt to the end of its turn."""
        text = self._render(messages)
        spans: list[Span] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:index], add_generation_prompt=True)
            until = self._render(messages[: index + 1])
            if not (text.startswith(until) and until.startswith(before)):
                raise UnusableConversation(
                    "template_not_prefix_stable",
                    f"the chat template renders the turns up to answer {len(spans)} differently once more "
                    "follow, so the answers cannot be found; use a template with {% generation %} blocks",
                )
            spans.append((len(before), len(until)))
        return text, spans

    def _tokenize(self, text: str, spans: list[Span], images: Sequence[Image.Image]) -> EncodedConversation:
        self._check_placeholders(text, len(images))
        bos = self.processor.tokenizer.bos_token
        try:
            outputs = self.processor(
                text=[text],
                images=[list(images)] if images else None,
                add_special_tokens=not (bos and text.startswith(bos)),
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
                return_tensors="pt",
            )
        except ValueError as error:
            raise UnusableConversation("refused_by_processor", str(error)) from error
        token_ids = outputs["input_ids"][0]
        replacements = self._replacements(outputs) if images else []
        image_positions = (token_ids == self.image_token_id).nonzero()[:, 0]
        num_expected = sum(replacement["replacement"].count(self._image_token) for replacement in replacements)
        if len(image_positions) != num_expected or len(replacements) != len(images):
            raise UnusableConversation(
                "image_count_mismatch",
                f"{len(image_positions)} image tokens where the processor expands {len(images)} images "
                f"to {num_expected}",
            )
        return EncodedConversation(
            token_ids=token_ids,
            answer_mask=_mask_of_spans(spans, replacements, outputs["offset_mapping"][0]),
            pixel_inputs={
                key: value for key, value in outputs.items() if key not in _TEXT_KEYS and isinstance(value, Tensor)
            },
            image_positions=image_positions,
        )

    def _replacements(self, outputs: Mapping[str, Any]) -> list[dict[str, Any]]:
        try:
            return list(outputs["text_replacement_offsets"][0])
        except KeyError as error:
            raise UserError(
                f"{type(self.processor).__name__} does not report where it expands image placeholders "
                "(text_replacement_offsets); use a processor built on transformers' ProcessorMixin.__call__"
            ) from error

    def _check_placeholders(self, text: str, num_images: int) -> None:
        """Text of a turn may not smuggle in an image, nor the template leave one out."""
        token = getattr(self.processor, "image_token", None) or self._image_token
        if text.count(token) != num_images:
            raise UnusableConversation(
                "image_count_mismatch",
                f"the rendered conversation holds {token!r} {text.count(token)} times for {num_images} "
                "images; the text of a turn must not contain it",
            )

    def _truncate(self, encoded: EncodedConversation) -> EncodedConversation:
        num_tokens = len(encoded.token_ids)
        if len(encoded.image_positions) and int(encoded.image_positions[-1]) >= self.max_length:
            raise UnusableConversation(
                "image_beyond_max_length",
                f"the last image token is number {int(encoded.image_positions[-1])} from 0, "
                f"max_length is {self.max_length}",
            )
        answer_mask = encoded.answer_mask[: self.max_length]
        if not bool(answer_mask.any()):
            raise UnusableConversation(
                "no_answer_within_max_length",
                f"no answer token among the first {self.max_length} of {num_tokens} tokens",
            )
        if num_tokens <= self.max_length:
            return encoded
        return EncodedConversation(
            token_ids=encoded.token_ids[: self.max_length].clone(),
            answer_mask=answer_mask.clone(),
            pixel_inputs=encoded.pixel_inputs,
            image_positions=encoded.image_positions,
        )


def chat_template(processor: Any) -> str:
    """The template `processor.apply_chat_template` uses when none is named.

    Raises:
        UserError: there is none.
    """
    template = processor.chat_template or processor.tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise UserError(
            f"{type(processor).__name__} has no (default) chat template; save one with the checkpoint "
            "(chat_template.jinja)"
        )
    return str(template)


def image_processor_backend(processor: Any) -> str:
    """Class name of what makes the pixels, such as `SiglipImageProcessorPil`; the saved JSON lacks it."""
    return type(processor.image_processor).__name__


def _place_images(question: str, num_images: int) -> str:
    return question if PLACEHOLDER in question else f"{PLACEHOLDER}\n" * num_images + question


def _messages(conversations: Sequence[Mapping[str, str]], num_images: int) -> list[Message]:
    """LLaVA's turns as chat messages: an optional system turn, then user and assistant in alternation."""
    messages: list[Message] = []
    for number, turn in enumerate(conversations):
        if not (isinstance(turn, Mapping) and isinstance(turn.get("value"), str) and turn.get("from") in _ROLES):
            raise UnusableConversation(
                "malformed_conversation",
                f"turn {number} is {turn!r:.200}; expected 'from' human, gpt or system and a string 'value'",
            )
        role = _ROLES[turn["from"]]
        parts = _parts(turn["value"], num_images) if role == "user" else [_text(turn["value"])]
        messages.append({"role": role, "content": parts})
    roles = [message["role"] for message in messages]
    dialogue = roles[1:] if roles[:1] == ["system"] else roles
    if not dialogue or dialogue != [("user", "assistant")[index % 2] for index in range(len(dialogue))]:
        raise UnusableConversation(
            "malformed_conversation", f"the roles are {roles}; expected user and assistant in turn"
        )
    num_placed = sum(part["type"] == "image" for message in messages for part in message["content"])
    if num_placed != num_images:
        raise UnusableConversation(
            "image_count_mismatch", f"{num_placed} {PLACEHOLDER} in the human turns, {num_images} images"
        )
    return messages


def _parts(text: str, num_images: int) -> list[dict[str, str]]:
    """A human turn in pieces; the placeholder of a single image moves to the front, as LLaVA itself does.

    So all conversations about one image share the tokens before it, and with them its attention maps.
    """
    pieces = re.split(f"{PLACEHOLDER}\n?", text)
    if len(pieces) == 1:
        return [_text(text)]
    if num_images == 1 and len(pieces) == 2:
        rest = "".join(text.split(PLACEHOLDER)).strip()
        return [{"type": "image"}, _text(rest)] if rest else [{"type": "image"}]
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append({"type": "image"})
        if piece:
            parts.append(_text(piece))
    return parts


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _mask_of_spans(spans: Sequence[Span], replacements: Sequence[Mapping[str, Any]], offsets_T2: Tensor) -> Tensor:
    """`[T]` bool: the tokens that overlap a span of the text as it was before image placeholders grew."""
    starts_T, ends_T = offsets_T2.unbind(-1)
    mask_T = torch.zeros(len(offsets_T2), dtype=torch.bool)
    for start, end in spans:
        grown_start, grown_end = (char + _chars_gained(char, replacements) for char in (start, end))
        mask_T |= (starts_T < grown_end) & (ends_T > grown_start) & (ends_T > starts_T)
    return mask_T


def _chars_gained(char: int, replacements: Sequence[Mapping[str, Any]]) -> int:
    """How far the character moves because of the placeholders before it that were expanded."""
    gained = 0
    for replacement in replacements:
        if replacement["span"][1] <= char:
            gained = replacement["new_span"][1] - replacement["span"][1]
    return gained
