"""The tokens of a conversation as people read them: runs of text, of an answer, of image tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from torch import Tensor

Part = Literal["text", "answer", "image"]

_UNREADABLE = "\N{REPLACEMENT CHARACTER}"
"""What a decoder gives for some bytes of a character."""


@dataclass(frozen=True)
class TokenRun:
    """Tokens one after another that are all of one kind."""

    part: Part
    start: int
    """Position of the first of them, from 0."""
    texts: tuple[str, ...]
    """The text of each, the space before a word included."""


def token_runs(tokenizer: Any, token_ids: Tensor, answer_mask: Tensor, image_token_id: int) -> list[TokenRun]:
    """The runs of a conversation.

    Args:
        tokenizer: that made the ids.
        token_ids: `[T]` integers.
        answer_mask: `[T]` bool, True at answer tokens.
        image_token_id: of the model's config.
    """
    ids = token_ids.tolist()
    texts = token_texts(tokenizer, ids)
    parts: list[Part] = [
        "answer" if is_answer else "image" if token == image_token_id else "text"
        for token, is_answer in zip(ids, answer_mask.tolist(), strict=True)
    ]
    runs, start = [], 0
    for part, group in groupby(parts):
        end = start + len(list(group))
        runs.append(TokenRun(part, start, tuple(texts[start:end])))
        start = end
    return runs


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token behind the one before it; the token's own name where it is a part of a character."""
    before, texts = "", []
    for place, token in enumerate(ids):
        context = [ids[place - 1]] if place else []
        both = _decode(tokenizer, [*context, token])
        # A tokenizer may drop the space before the first word of a text.
        text = both.removeprefix(before) if both.startswith(before) else _decode(tokenizer, [token])
        is_readable = text and _UNREADABLE not in text
        texts.append(text if is_readable else str(tokenizer.convert_ids_to_tokens(token) or token))
        before = _decode(tokenizer, [token])
    return texts


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
