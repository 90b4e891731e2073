"""Turns of a LLaVA conversation as the messages that a chat template renders."""

import re
from collections.abc import Sequence
from typing import Any, Final

from stages.conversations.turns import PLACEHOLDER, Role, Turn, check_placeholders
from storage.samples.image_settings import ImagePosition

Message = dict[str, Any]

_ROLES: Final[dict[Role, str]] = {"human": "user", "gpt": "assistant", "system": "system"}


def to_messages(turns: Sequence[Turn], num_images: int, position: ImagePosition = "front") -> list[Message]:
    """One message a turn; placeholders in human turns become image parts, unless there are no images at all.

    Raises:
        UnusableSample: If the human turns have another number of placeholders than images.
    """
    messages: list[Message] = [
        {
            "role": _ROLES[role],
            "content": _parts(text, num_images, position) if role == "human" and num_images else [text_part(text)],
        }
        for role, text in turns
    ]
    num_placed = sum(part["type"] == "image" for message in messages for part in message["content"])
    check_placeholders(num_placed, num_images, "the human turns")
    return messages


def with_placeholders(question: str, num_images: int) -> str:
    """The question as it is if it names its images, else with all of them before it."""
    return question if PLACEHOLDER in question else f"{PLACEHOLDER}\n" * num_images + question


def text_part(text: str) -> dict[str, str]:
    """A part of a message that is text."""
    return {"type": "text", "text": text}


def _parts(text: str, num_images: int, position: ImagePosition) -> list[dict[str, str]]:
    """A human turn in parts; `front` moves the placeholder of a single image there, as LLaVA itself does.

    So all conversations about one image share the tokens before it, and with them its attention maps.
    """
    pieces = re.split(f"({PLACEHOLDER})\n?", text)
    if position == "front" and num_images == pieces.count(PLACEHOLDER) == 1:
        rest = text.replace(PLACEHOLDER, "").strip()
        return [{"type": "image"}, *([text_part(rest)] if rest else [])]
    parts = [{"type": "image"} if piece == PLACEHOLDER else text_part(piece) for piece in pieces if piece]
    return parts or [text_part(text)]
