"""Questions that are answered by yes or no: how they are put, the parser of POPE and R-Bench, and their metrics."""

from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from stages.evaluation.suites.pictures import SuitePicture
from stages.evaluation.suites.suite import Answer, Counts, KindCounts, Metrics, Protocol, Question, Suite, ratio
from storage.errors import UserError

YES_NO_PROTOCOLS: Final[tuple[Protocol, ...]] = ("generate", "yes_over_no")
_TABLE: Final = ("true_positives", "false_positives", "true_negatives", "false_negatives")


def two_way_question(
    prompt: str,
    picture: SuitePicture,
    protocol: Protocol,
    answers: tuple[str, str] = ("Yes", "No"),
    max_new_tokens: int = 16,
) -> Question:
    """A question that one of two answers is written to, or whose first tokens are compared, as the protocol says."""
    if protocol == "yes_over_no":
        return Question(prompt, (picture,), answers, first_token_only=True)
    return Question(prompt, (picture,), max_new_tokens=max_new_tokens)


def yes_or_no_label(label: str, where: str) -> str:
    """The right answer of a question, "yes" or "no"; the makers write it in letters of any size.

    Raises:
        UserError: If it is something else, which a parser of answers would take for a yes.
    """
    found = label.strip().rstrip(".").lower()
    if found not in ("yes", "no"):
        raise UserError(f"{where}: label {label!r:.100}; expected yes or no")
    return found


def first_is_likelier(answer: Answer) -> bool | None:
    """Whether the first of two candidates is likelier than the second; None if both are as likely."""
    assert not isinstance(answer, str)
    first, second = answer
    return None if first.log_prob == second.log_prob else first.log_prob > second.log_prob


def answered_yes(answer: Answer, is_yes: bool) -> bool:
    """Whether an answer to `two_way_question` is taken for a yes, where `is_yes` says what is right; a tie is wrong."""
    if isinstance(answer, str):
        return says_yes(answer)
    found = first_is_likelier(answer)
    return not is_yes if found is None else found


def says_yes(answer: Answer) -> bool:
    """Whether an answer is taken for a yes: unless "No", "not" or "no" is a word of its first sentence.

    Letters count as they are: "NO" is a yes. Source: `eval_pope.py` of LLaVA, `eval.py` of R-Bench.
    """
    assert isinstance(answer, str)
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def yes_no_counts(said_yes: bool, is_yes: bool) -> Counts:
    """What one answer adds to the table of hits and misses; whether it is right."""
    return {
        "accuracy": said_yes == is_yes,
        "true_positives": said_yes and is_yes,
        "false_positives": said_yes and not is_yes,
        "true_negatives": not said_yes and not is_yes,
        "false_negatives": not said_yes and is_yes,
    }


def f1_of_always_yes(suite: Suite, counts: KindCounts) -> Metrics:
    """The F1 of a suite, by kind, for a model that says yes to every question: with half of the labels yes, 66.7."""
    zero = np.zeros(1)
    answered = {}
    for kind, sums in counts.items():
        hits, false_alarms, rejections, misses = (sums.get(name, zero) for name in _TABLE)
        always_yes = (hits + misses, false_alarms + rejections, zero, zero)
        answered[kind] = {**sums, **dict(zip(_TABLE, always_yes, strict=True))}
    found = suite.metrics(answered)
    return {kind: {"f1": of_kind["f1"]} for kind, of_kind in found.items() if "f1" in of_kind}


def yes_no_metrics(sums: Mapping[str, NDArray[np.float64]], epsilon: float = 0.0) -> dict[str, NDArray[np.float64]]:
    """In percent; "yes" is the positive class. `epsilon` is what the makers add to denominators."""
    hits, false_alarms, rejections, misses = (sums.get(name, np.zeros_like(sums["items"])) for name in _TABLE)
    precision = ratio(hits, hits + false_alarms + epsilon)
    recall = ratio(hits, hits + misses + epsilon)
    shares = {
        "f1": ratio(2 * precision * recall, precision + recall + epsilon),
        "accuracy": ratio(hits + rejections, sums["items"]),
        "precision": precision,
        "recall": recall,
        "yes_share": ratio(hits + false_alarms, sums["items"]),
    }
    return {name: 100 * share for name, share in shares.items()}
