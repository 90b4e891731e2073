"""Suites that ask which caption fits a picture: how captions are put to a model, and their scores."""

import re
from collections.abc import Sequence
from typing import Final, cast

from stages.evaluation.suites.pictures import SuitePicture
from stages.evaluation.suites.suite import Answer, Counts, Likelihood, Protocol, Question

CAPTION_PROTOCOLS: Final[tuple[Protocol, ...]] = ("likelihood", "mean_likelihood", "yes_probability")
"""Those that give every caption of every picture a score."""
PAIR_PROTOCOLS: Final[tuple[Protocol, ...]] = (*CAPTION_PROTOCOLS, "compodistill")
"""Those for captions that are compared in pairs."""
CAPTION_PROMPT: Final = "Describe the image."
"""The question whose answer a caption is."""
YES_QUESTION: Final = 'Does this figure show "{caption}"? Please answer Yes or No.'
"""VQAScore's. Source: Lin et al., "Evaluating Text-to-Visual Generation with Image-to-Text Generation", 2024."""
LETTER_QUESTION: Final = (
    "Which caption best describes the image?\n(A) {a}\n (B) {b}\n"
    "Answer with the option's alphabet from the given choices directly."
)
"""CompoDistill's, with its blank before (B). Source: eval_sugarcrepe.py of the authors' repository."""
_LETTER_TOKENS: Final = 32
_LETTER: Final = re.compile(r"\b([AB])\b")


def caption_questions(
    captions: Sequence[str], pictures: Sequence[SuitePicture], protocol: Protocol
) -> tuple[Question, ...]:
    """The questions that give every caption a score for every picture, picture after picture."""
    if protocol == "yes_probability":
        return tuple(
            Question(YES_QUESTION.format(caption=caption), (picture,), ("Yes",), first_token_only=True)
            for picture in pictures
            for caption in captions
        )
    return tuple(Question(CAPTION_PROMPT, (picture,), tuple(captions)) for picture in pictures)


def caption_scores(answers: Sequence[Answer], num_captions: int, protocol: Protocol) -> list[list[float]]:
    """`scores[picture][caption]` from the answers to `caption_questions`; higher fits better."""
    found = [likelihood for answer in answers for likelihood in cast("tuple[Likelihood, ...]", answer)]
    scores = [one.mean if protocol == "mean_likelihood" else one.total for one in found]
    return [scores[start : start + num_captions] for start in range(0, len(scores), num_captions)]


def is_best(scores: Sequence[float], number: int) -> bool:
    """Whether this score is above all others; a tie is a miss."""
    return all(scores[number] > other for at, other in enumerate(scores) if at != number)


def pair_questions(fitting: str, other: str, picture: SuitePicture, protocol: Protocol) -> tuple[Question, ...]:
    """What asks by one of `PAIR_PROTOCOLS` which of two captions fits."""
    if protocol == "compodistill":
        return letter_questions(fitting, other, picture)
    return caption_questions([fitting, other], [picture], protocol)


def pair_counts(answers: Sequence[Answer], protocol: Protocol) -> Counts:
    """What the answers to `pair_questions` count; both orders are also reported apart."""
    if protocol == "compodistill":
        first, second = letters_right(answers)
        counts = {"accuracy": (first + second) / 2, "accuracy_first_order": first, "accuracy_second_order": second}
        return counts | {"unread": share_unread(answers)}
    (scores,) = caption_scores(answers, 2, protocol)
    return {"accuracy": is_best(scores, 0)}


PAIR_CHANCE: Final = {"accuracy": 50.0, "accuracy_first_order": 50.0, "accuracy_second_order": 50.0}
"""What guessing gets of `pair_counts`, in percent."""


def letter_questions(fitting: str, other: str, picture: SuitePicture) -> tuple[Question, Question]:
    """The authors' question with the fitting caption as (A), then with the fitting caption as (B)."""
    first, second = (
        Question(LETTER_QUESTION.format(a=a, b=b), (picture,), max_new_tokens=_LETTER_TOKENS)
        for a, b in ((fitting, other), (other, fitting))
    )
    return first, second


def letters_right(answers: Sequence[Answer]) -> tuple[bool, bool]:
    """Whether each of the two answers to `letter_questions` names the fitting caption."""
    first, second = answers
    return letter_of(first) == "A", letter_of(second) == "B"


def share_unread(answers: Sequence[Answer]) -> float:
    """The share of answers to `letter_questions` without a letter: all of them where a model does not follow."""
    return sum(letter_of(answer) is None for answer in answers) / len(answers)


def letter_of(answer: Answer) -> str | None:
    """The first letter A or B that stands alone, as the authors' script reads it; the article "a" is one too."""
    assert isinstance(answer, str)
    found = _LETTER.search(answer.strip().upper())
    return found[1] if found else None
