"""Prompts of other evaluation harnesses: chat messages with text and pictures, as turns in LLaVA's layout."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from stages.conversations.turns import PLACEHOLDER, shorten
from stages.images import FORMAT_NAMES, convert_image, decode_image
from stages.unusable_sample import UnusableSample
from storage.regular_files import read_regular
from storage.samples.image_settings import ExifTurn
from storage.samples.members import MAX_MEMBER_BYTES


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the question that a model answers.

    Attributes:
        name: What errors call it.
        turns: Of `from` and `value`; the last is the question.
        images: In the order of the placeholders: images of Pillow, or paths and bytes of image files.
    """

    name: str
    turns: tuple[dict[str, str], ...]
    images: tuple[object, ...] = ()


def to_prompt(name: str, messages: Sequence[Mapping[str, Any]]) -> Prompt:
    """The prompt of chat messages: `role`, and `content` that is a text or parts.

    A part has a `type`: `text` with `text`, or `image` with `url`, which is an image of Pillow, a path or bytes. Images
    stand where their parts stand, or where the texts of their message have `<image>`, if they have any.

    Raises:
        UnusableSample: If a part is of another type, such as `video`, or the last message is not the user's.
    """
    turns, images = [], list[object]()
    if not messages or messages[-1]["role"] != "user":
        found = f"{name} ends with a message of {messages[-1]['role']}" if messages else f"{name} has no message"
        raise UnusableSample("wrong_turn_order", f"{found}; expected the user's question: choose a task of questions")
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if unread := sorted({str(part["type"]) for part in parts} - {"text", "image"}):
            found = f"{name} has a part of type {', '.join(unread)}"
            raise UnusableSample("unread_field", f"{found}; text and images are read: choose a task of these")
        texts_place_images = any(PLACEHOLDER in part["text"] for part in parts if part["type"] == "text")
        image_text = "" if texts_place_images else f"{PLACEHOLDER}\n"
        value = "".join(part["text"] if part["type"] == "text" else image_text for part in parts)
        turns.append({"from": message["role"], "value": value})
        images += [part["url"] for part in parts if part["type"] == "image"]
    return Prompt(name, tuple(turns), tuple(images))


def load_image(source: object, max_pixels: int, exif: ExifTurn) -> Image.Image:
    """An image of a prompt as samples are read: in RGB, without metadata.

    Raises:
        UnusableSample: If it cannot be read; with the reason.
    """
    if isinstance(source, Image.Image):
        return convert_image(source, max_pixels, exif)
    if isinstance(source, bytes):
        return decode_image(source, max_pixels, exif)
    if not isinstance(source, str | Path):
        found = f"an image is {shorten(source)}"
        raise UnusableSample("bad_image_field", f"{found}; expected an image of Pillow, or path or bytes of a file")
    try:
        data = read_regular(Path(source), MAX_MEMBER_BYTES)
    except OSError as error:
        found = f"no image at {shorten(str(source))}: {error.strerror}; expected a {FORMAT_NAMES} file"
        raise UnusableSample("missing_image", f"{found}; addresses of the web are not read") from error
    return decode_image(data, max_pixels, exif)
