"""Whether a chat template lets a student learn where an answer ends."""

from typing import Any

from stages.conversations.cuts import answer_runs
from stages.conversations.encoder import NO_LIMIT, ConversationEncoder
from stages.unusable_sample import UnusableSample

_TURNS = (("human", "What?"), ("gpt", "This."), ("human", "Where?"), ("gpt", "There."))
_TWO_ANSWERS = [{"from": role, "value": value} for role, value in _TURNS]


def answer_end(processor: Any, image_token_id: int) -> int | None:
    """The token that ends every answer of a conversation; None without one, or where it differs."""
    last_ids, ends = _last_ids(processor, image_token_id)
    return last_ids[0] if len(set(last_ids)) == 1 and last_ids[0] in ends else None


def notes_of_ends(processor: Any, image_token_id: int, whose: str, way_out: str) -> tuple[str, ...]:
    """A note for the user if answers have no end that a student could learn; empty if they have one.

    `whose` is the subject of the sentence, such as "the chat template of X", and `way_out` what to do about it.
    """
    last_ids, ends = _last_ids(processor, image_token_id)
    num_ended = sum(token in ends for token in last_ids)
    if num_ended == len(last_ids):
        return ()
    found = f"{whose} ends {num_ended} of {len(last_ids)} answers of a conversation with an end token"
    return (f"{found}, so a student does not learn to end an answer: it writes on until it is cut. {way_out}",)


def _last_ids(processor: Any, image_token_id: int) -> tuple[list[int], set[int | None]]:
    """The last token of each of two answers, none where the template refuses them; and tokens that can end one."""
    ends = {*processor.tokenizer.added_tokens_decoder, processor.tokenizer.eos_token_id}
    try:
        encoded = ConversationEncoder(processor, image_token_id, NO_LIMIT).encode(_TWO_ANSWERS, [])
    except UnusableSample:
        # Then no sample gets through either, each with its reason.
        return [], ends
    return [int(encoded.token_ids[end - 1]) for _, end in answer_runs(encoded.answer_mask)], ends
