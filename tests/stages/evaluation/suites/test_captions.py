from pathlib import Path

import pytest

from stages.evaluation.suites.captions import (
    caption_questions,
    caption_scores,
    is_best,
    letter_of,
    letter_questions,
    pair_counts,
)
from stages.evaluation.suites.pictures import PictureFile, SuitePicture
from stages.evaluation.suites.suite import Likelihood, Protocol

PICTURE = SuitePicture(PictureFile(Path("a.png")))


@pytest.mark.parametrize(
    ("text", "letter"),
    [("A", "A"), ("(B)", "B"), ("The answer is b.", "B"), ("A cat is on B", "A"), ("Caption", None), ("", None)],
)
def test_letters_are_read_as_the_authors_script_reads_them(text: str, letter: str | None) -> None:
    assert letter_of(text) == letter


def test_the_letter_question_is_the_authors_with_both_orders_of_captions() -> None:
    first, second = letter_questions("fits", "differs", PICTURE)
    assert first.prompt == (
        "Which caption best describes the image?\n(A) fits\n (B) differs\n"
        "Answer with the option's alphabet from the given choices directly."
    )
    assert second.prompt == first.prompt.replace("fits", "-").replace("differs", "fits").replace("-", "differs")
    assert (first.candidates, first.max_new_tokens) == ((), 32)


@pytest.mark.parametrize(
    ("answers", "first", "second", "unread"),
    [
        (["A", "B"], 1, 1, 0),
        (["A", "A"], 1, 0, 0),
        (["B", "B"], 0, 1, 0),
        (["?", "C"], 0, 0, 1),
        (["A", ""], 1, 0, 0.5),
    ],
)
def test_each_order_counts_half(answers: list[str], first: float, second: float, unread: float) -> None:
    counts = pair_counts(answers, "compodistill")
    assert counts == {
        "accuracy": (first + second) / 2,
        "accuracy_first_order": first,
        "accuracy_second_order": second,
        "unread": unread,
    }


@pytest.mark.parametrize(
    ("protocol", "expected"), [("likelihood", [[-6.5, -4.25]]), ("mean_likelihood", [[-1.5, -4.0]])]
)
def test_the_end_counts_in_the_sum_and_not_in_the_mean(protocol: Protocol, expected: list[list[float]]) -> None:
    answers = [(Likelihood(-6.0, 4, -0.5), Likelihood(-4.0, 1, -0.25))]
    assert caption_scores(answers, 2, protocol) == expected


def test_scores_come_back_picture_by_picture() -> None:
    questions = caption_questions(["x", "y"], [PICTURE, PICTURE], "yes_probability")
    assert [question.prompt for question in questions[:2]] == [
        'Does this figure show "x"? Please answer Yes or No.',
        'Does this figure show "y"? Please answer Yes or No.',
    ]
    answers = [(Likelihood(-float(number), 1, 0.0),) for number in range(4)]
    assert caption_scores(answers, 2, "yes_probability") == [[0, -1], [-2, -3]]


def test_a_tie_is_a_miss() -> None:
    assert is_best([-1.0, -2.0, -3.0], 0)
    assert not is_best([-1.0, -1.0, -3.0], 0)
    assert not is_best([-1.0, -2.0], 1)
