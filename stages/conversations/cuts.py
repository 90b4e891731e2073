"""Where a conversation of more than `max_length` tokens ends, and which turns and images are left of it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from stages.conversations.turns import PLACEHOLDER, parse_turns
from stages.unusable_sample import UnusableSample
from storage.targets.manifest import Cut

StoredTurns = Sequence[Mapping[str, str]]
"""Turns as a sample's JSON has them (`from`, `value`)."""


def answer_runs(mask_T: Tensor) -> list[tuple[int, int]]:
    """The first token of each answer and the one behind its last; between two answers there is always a question."""
    edges = torch.diff(pad(mask_T.int(), (1, 1)))
    starts, ends = ((edges == edge).nonzero()[:, 0].tolist() for edge in (1, -1))
    return list(zip(starts, ends, strict=True))


def kept_length(answer_mask: Tensor, image_positions: Tensor, max_length: int, cut: Cut) -> int:
    """The number of tokens up to where a conversation is cut, or of all that it has.

    Where it is less than the last of `image_positions`, the cut takes images of later turns. Then it is the end of an
    answer or, with `tokens`, lies in an answer.

    Raises:
        UnusableSample: If no answer is left, or with `tokens` no answer token.
    """
    num_tokens, answers = len(answer_mask), answer_runs(answer_mask)
    last_image = int(image_positions[-1]) if len(image_positions) else -1
    if cut == "tokens" or num_tokens <= max_length:
        ends = [min(end, max_length) for start, end in answers if start < max_length]
    else:
        ends = [end for _, end in answers if end <= max_length]
    if not ends:
        raise _nothing_left(answers, image_positions, num_tokens, max_length, cut)
    if num_tokens <= max_length:
        return num_tokens
    return max_length if cut == "tokens" and last_image < max_length else ends[-1]


def turns_until(turns: StoredTurns, num_answers: int) -> StoredTurns:
    """The turns up to that answer, counted from 1; all of them if there are fewer."""
    ends = [number + 1 for number, turn in enumerate(parse_turns(turns)) if turn.role == "gpt"]
    return turns[: ends[num_answers - 1]] if num_answers <= len(ends) else turns


def num_placeholders(turns: StoredTurns) -> int:
    """Images that the questions name, in a conversation that has images."""
    return sum(turn.text.count(PLACEHOLDER) for turn in parse_turns(turns) if turn.role == "human")


def part_with_images(
    turns: StoredTurns, num_images: int, answer_mask: Tensor, num_cut_answer_tokens: int
) -> tuple[StoredTurns, int]:
    """The turns that a model read, and how many of the sample's images, where a cut may have taken the later ones.

    All of both, unless the tokens that were read end with an answer, answer tokens were lost, and turns after that
    answer name images. `answer_mask` is that of the tokens that were read.
    """
    if num_images and num_cut_answer_tokens and bool(answer_mask[-1]):
        part = turns_until(turns, len(answer_runs(answer_mask)))
        if (num_kept := num_placeholders(part)) < num_images:
            return part, num_kept
    return turns, num_images


def _nothing_left(
    answers: Sequence[tuple[int, int]], image_positions: Tensor, num_tokens: int, max_length: int, cut: Cut
) -> UnusableSample:
    first_answer = answers[0][0] if answers else num_tokens
    of_first_T, last_image = image_positions[image_positions < first_answer], int(max(image_positions, default=-1))
    if len(of_first_T) and of_first_T[-1] >= max_length:
        found = f"the last image token is number {last_image} from 0, max_length is {max_length}"
        return UnusableSample("image_beyond_max_length", found)
    if cut == "tokens" or num_tokens <= max_length:
        found = f"no answer token among the first {max_length} of {num_tokens} tokens"
        return UnusableSample("no_answer_within_max_length", found)
    behind = (
        f" behind the last image, {last_image + 1} tokens from the start," if -1 < last_image < first_answer else ""
    )
    found = f"no answer{behind} ends within max_length, {max_length} tokens"
    return UnusableSample("too_long", f"{found}; answers end after {[end for _, end in answers[:3]]} tokens")
