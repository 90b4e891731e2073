"""Questions about an image to a model, on the command line."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.ui.streams import say
from stages.images import FORMAT_NAMES, decode_image
from stages.unusable_sample import UnusableSample
from storage.errors import UserError
from storage.printable import printable
from storage.regular_files import read_regular
from storage.samples.image_settings import DEFAULT_IMAGES
from storage.samples.members import MAX_MEMBER_BYTES

if TYPE_CHECKING:
    from stages.student.model.chat import Chat


def open_chat(model: str, image: Path, max_new_tokens: int) -> "Chat":
    """A conversation with a checkpoint, a training run's student or an export about an image file.

    Raises:
        UserError: If there is no such checkpoint or image, the image cannot be decoded, or the model has no chat
            template.
    """
    try:
        data = read_regular(image, MAX_MEMBER_BYTES)
    except OSError as error:
        raise UserError(f"no image at {image}: {error.strerror}; give a {FORMAT_NAMES} file") from error
    decode_image(data)  # before a model is loaded
    from pipeline.models import load_model
    from stages.checkpoints.image_settings import image_settings
    from stages.student.model.chat import Chat

    loaded, processor = load_model(model)
    reading = image_settings(loaded.config) or DEFAULT_IMAGES
    return Chat(loaded, processor, decode_image(data, exif=reading.exif), max_new_tokens)


def answer(chat: "Chat", question: str) -> None:
    """Writes the answer to standard output while it is made, and a note on standard error if it is empty."""
    text = chat.ask(question, _write)
    _write("\n")
    if not text:
        say("(an empty answer: the model ended it at once)")


def talk(chat: "Chat") -> None:
    """Reads questions from standard input until an empty line or its end; refuses those that cannot be asked."""
    while question := _next_question():
        try:
            answer(chat, question)
        except UnusableSample as error:
            _write(f"{error}\n")


def _next_question() -> str:
    # No prompt where the questions come from a file or a pipe.
    if sys.stdin.isatty():
        _write("> ")
    return sys.stdin.readline().strip()


def _write(text: str) -> None:
    sys.stdout.write(printable(text, keep="\n\t"))
    sys.stdout.flush()
