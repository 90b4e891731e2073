"""Where the answers lie in a rendered conversation: spans of characters, and the tokens they become.

The spans are read from the template's `{% generation %}` blocks or, for the many templates without one, from
renderings of the conversation's prefixes. The tokenizer's offsets carry them over to tokens.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from tokenizers import Tokenizer
from torch import Tensor

from stages.conversations.chat_templates import ChatTemplate
from stages.conversations.messages import Message
from stages.conversations.template_process import Span
from stages.unusable_sample import UnusableSample

_TRIMS: Final = b'"trim_offsets":true'
"""In the JSON of a post-processor, which may be a sequence of several."""


def render_with_answers(template: ChatTemplate, messages: list[Message]) -> tuple[str, list[Span]]:
    """The text and the answers in it, without white space at their ends.

    In many tokenizers the space before a word is a part of it, and that word belongs to the next turn.

    Raises:
        UnusableSample: If the template raises, or renders a turn differently once more turns follow.
    """
    text, spans = template.render_marked(messages) if template.marks_answers else _by_prefixes(template, messages)
    ends = [len(text[:end].rstrip()) for _, end in spans]
    return text, [(start, end) for (start, _), end in zip(spans, ends, strict=True) if start < end]


def expand_placeholders(text: str, replacements: Sequence[Mapping[str, Any]]) -> str:
    """The text as the processor gives it to the tokenizer; `replacements` are its `text_replacement_offsets`."""
    pieces, last = [], 0
    for replacement in replacements:
        first, after = replacement["span"]
        pieces += [text[last:first], replacement["replacement"]]
        last = after
    return "".join([*pieces, text[last:]])


def mask_of_spans(spans: Sequence[Span], replacements: Sequence[Mapping[str, Any]], offsets_T2: Tensor) -> Tensor:
    """Marks the tokens that overlap a span.

    Args:
        spans: of the text as it was before image placeholders grew.
        replacements: the processor's `text_replacement_offsets`: where placeholders stood, and where they are now.
        offsets_T2: `[T, 2]` first and last character of each token.

    Returns:
        `[T]` bool.
    """
    placed = [(replacement["span"][1], replacement["new_span"][1]) for replacement in replacements]
    starts_T, ends_T = offsets_T2.unbind(-1)
    mask_T = torch.zeros(len(offsets_T2), dtype=torch.bool)
    for start, end in spans:
        # A character moves because of the placeholders before it that grew.
        grown_start, grown_end = (
            char + next((new - old for old, new in reversed(placed) if old <= char), 0) for char in (start, end)
        )
        mask_T |= (starts_T < grown_end) & (ends_T > grown_start) & (ends_T > starts_T)
    return mask_T


def untrimmed(tokenizer: Tokenizer) -> Tokenizer | None:
    """A copy whose offsets hold all characters of a token; None for a tokenizer that does so itself.

    Many byte-level tokenizers leave white space out of them (`trim_offsets`). A token of white space alone would then
    be in no span.
    """
    rules = tokenizer.post_processor
    if rules is None or _TRIMS not in (state := rules.__getstate__()):
        return None
    copied = copy.deepcopy(tokenizer)
    rules.__setstate__(state.replace(_TRIMS, b'"trim_offsets":false'))
    copied.post_processor = rules
    copied.no_truncation()
    copied.no_padding()
    return copied


def _by_prefixes(template: ChatTemplate, messages: list[Message]) -> tuple[str, list[Span]]:
    """An answer spans from the end of its prompt to the end of its turn."""
    text = template.render(messages)
    spans: list[Span] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = template.render(messages[:index], add_generation_prompt=True)
        until = template.render(messages[: index + 1])
        if not (text.startswith(until) and until.startswith(before)):
            found = f"the chat template renders the turns up to answer {len(spans)} differently once more follow"
            way_out = "so the answers cannot be found; use a template with {% generation %} blocks"
            raise UnusableSample("template_not_prefix_stable", f"{found}, {way_out}")
        spans.append((len(before), len(until)))
    return text, spans
