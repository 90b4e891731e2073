"""A first look at a model: questions about an image on the command line."""

import sys
from pathlib import Path

from pipeline.evaluation import load_model
from stages.images import decode_image
from stages.student.model.chat import Chat
from stages.unusable_sample import UnusableSample
from storage.errors import UserError


def open_chat(model: str, image: Path, max_new_tokens: int) -> Chat:
    """A conversation of a checkpoint, a training run or an export about an image file; on the GPU when there is one.

    Raises:
        UserError: no such checkpoint or image, an image that cannot be decoded, or a model without a chat template.
    """
    try:
        picture = decode_image(image.read_bytes())
    except OSError as error:
        raise UserError(f"no image at {image}: {error.strerror}; give a JPEG, PNG or WebP file") from error
    return Chat(*load_model(model), picture, max_new_tokens)


def answer(chat: Chat, question: str) -> None:
    """Writes the answer to standard output while it is made; of an empty one standard error says that it was."""
    text = chat.ask(question, _write)
    _write("\n")
    if not text:
        sys.stderr.write("(an empty answer: the model ended it at once)\n")


def talk(chat: Chat) -> None:
    """Reads questions from standard input until an empty line or its end; a question that cannot be put is refused."""
    while question := _next_question():
        try:
            answer(chat, question)
        except UnusableSample as error:
            _write(f"{error}\n")


def _next_question() -> str:
    # The prompt only where somebody reads it.
    if sys.stdin.isatty():
        _write("> ")
    return sys.stdin.readline().strip()


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
