"""Two captions and two pictures, each caption of one picture: how they are asked, and which comparisons are right."""

from collections.abc import Sequence
from typing import Final, NamedTuple

from stages.evaluation.suites.captions import caption_questions, caption_scores, letter_questions, letters_right
from stages.evaluation.suites.pictures import SuitePicture
from stages.evaluation.suites.suite import Answer, Protocol, Question

TWO_BY_TWO_PROTOCOLS: Final[tuple[Protocol, ...]] = (
    "yes_probability",
    "likelihood",
    "mean_likelihood",
    "compodistill",
)
"""VQAScore first, as the makers ask generative models: some scores are compared across pictures, and likelihoods are
not made for that, as some pictures make every caption likely."""


class Comparisons(NamedTuple):
    """Which of the four comparisons are right; a tie is not. With letters the last two are not asked."""

    first_text: float
    """Of the first picture, its caption scores above the other one. A share where it was asked more than once."""
    second_text: float
    both_texts: float
    first_image: bool | None = None
    """Of the first caption, its picture scores above the other one."""
    second_image: bool | None = None


def two_by_two_questions(
    captions: Sequence[str], pictures: Sequence[SuitePicture], protocol: Protocol
) -> tuple[Question, ...]:
    """Which caption belongs to which picture; the first to the first, the second to the second."""
    if protocol != "compodistill":
        return caption_questions(captions, pictures, protocol)
    first, second = captions
    return (*letter_questions(first, second, pictures[0]), *letter_questions(second, first, pictures[1]))


def comparisons(answers: Sequence[Answer], protocol: Protocol) -> Comparisons:
    """From the answers to `two_by_two_questions`.

    Source: `get_winoground_acc` of linzhiqiu/t2v_metrics; `CLIP_utils.py` of IMirandaM/BiVLC computes the same.
    """
    if protocol == "compodistill":
        first_AB, second_BA = letters_right(answers[:2]), letters_right(answers[2:])
        # Both pictures with the options in the same order: who always answers A is never right about both.
        both = [one and two for one, two in zip(first_AB, reversed(second_BA), strict=True)]
        return Comparisons(sum(first_AB) / 2, sum(second_BA) / 2, sum(both) / 2)
    (c0_i0, c1_i0), (c0_i1, c1_i1) = caption_scores(answers, 2, protocol)
    first_text, second_text = c0_i0 > c1_i0, c1_i1 > c0_i1
    return Comparisons(first_text, second_text, first_text and second_text, c0_i0 > c0_i1, c1_i1 > c1_i0)
