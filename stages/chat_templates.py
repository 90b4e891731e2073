"""Chat templates that come with the package, and whether a template lets a student learn where answers end."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.conversations import ConversationEncoder, UnusableConversation
from storage.errors import UserError

FOLDER = Path(__file__).parent / "templates"
"""`llava-1.5.jinja` is the format LLaVA-1.5 was trained on (conversation `vicuna_v1` of its code), with the end token
after each answer that the published checkpoint's own template leaves out."""

_PROBE = [
    {"from": role, "value": value}
    for role, value in (("human", "What?"), ("gpt", "This."), ("human", "Where?"), ("gpt", "There."))
]
_NO_LIMIT = 2**31


def read_template(name: str) -> str:
    """A chat template: the text of a jinja file, or of one that comes with the package, by its bare name.

    Raises:
        UserError: neither is there, or the file cannot be read.
    """
    path = Path(name)
    bundled = {file.stem: file for file in sorted(FOLDER.glob("*.jinja"))}
    if not path.is_file() and name in bundled:
        path = bundled[name]
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"chat template {name} cannot be read: {error}; give the path of a jinja file, or one of the templates "
            f"that come with the package: {', '.join(bundled)}"
        ) from error


def notes_of_ends(processor: Any, image_token_id: int, whose: str, way_out: str) -> tuple[str, ...]:
    """Says that answers have no end that a student could learn, if that is so; empty if they do.

    Args:
        processor: its chat template is asked for a conversation of two answers.
        image_token_id: `config.image_token_id` of the model.
        whose: the subject of the sentence, such as "the chat template of X".
        way_out: what to do about it.
    """
    try:
        encoded = ConversationEncoder(processor, image_token_id, _NO_LIMIT).encode(_PROBE, [])
    except UnusableConversation:
        # Then no sample gets through either, each with its reason.
        return ()
    last_ids = encoded.token_ids[_last_of_runs(encoded.answer_mask)].tolist()
    tokenizer = processor.tokenizer
    ends = {*tokenizer.added_tokens_decoder, tokenizer.eos_token_id}
    num_ended = sum(token in ends for token in last_ids)
    if num_ended == len(last_ids):
        return ()
    note = (
        f"{whose} ends {num_ended} of {len(last_ids)} answers of a conversation with an end token, so a student does "
        f"not learn to end an answer: it writes on until it is cut. {way_out}"
    )
    return (note,)


def _last_of_runs(mask_T: Tensor) -> Tensor:
    """`[T]` bool: where a run of True ends."""
    after_T = torch.cat([mask_T[1:], mask_T.new_zeros(1)])
    return mask_T & ~after_T
