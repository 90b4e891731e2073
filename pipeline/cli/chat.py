"""`cdp chat`."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import check_and_say_which, input_path


def chat(
    model: Annotated[str, typer.Argument(help="Export, training run, checkpoint folder or hub id.")],
    image: Annotated[Path, typer.Argument(callback=input_path, help="JPEG, PNG, WebP, GIF, BMP or TIFF file.")],
    question: Annotated[str | None, typer.Argument(help="Default: questions are read until an empty line.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens after which an answer is cut.", min=1)] = 256,
) -> None:
    """Asks a model about an image. The answer comes word by word, always the most likely next token."""
    from pipeline.chat import answer, open_chat, talk

    check_and_say_which(model)
    opened = open_chat(model, image, max_new_tokens)
    if question is None:
        talk(opened)
    else:
        answer(opened, question)
