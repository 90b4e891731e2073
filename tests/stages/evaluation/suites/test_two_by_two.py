from pathlib import Path

import pytest

from stages.evaluation.suites.bivlc import BiVLC
from stages.evaluation.suites.pictures import PictureFile, SuitePicture
from stages.evaluation.suites.suite import Item, Likelihood
from stages.evaluation.suites.two_by_two import comparisons, two_by_two_questions
from stages.evaluation.suites.winoground import Winoground

ITEM = Item("0", ("all",), (), None)
PICTURES = [SuitePicture(PictureFile(Path(f"{number}.png"))) for number in (0, 1)]


def answered(c0: tuple[float, float], c1: tuple[float, float]) -> list[tuple[Likelihood, ...]]:
    """Captions' scores of the first and the second picture, as answers by likelihood."""
    return [tuple(Likelihood(score, 1, 0.0) for score in of_picture) for of_picture in zip(c0, c1, strict=True)]


ALL_RIGHT = dict.fromkeys(("Ipos2T", "Ineg2T", "Tpos2I", "Tneg2I", "I2T", "T2I", "group"), True)
GOLDEN = {
    "all right": ((0.9, 0.8), (0.1, 0.85), ALL_RIGHT),
    "a picture that fits everything": (
        (0.9, 0.95),
        (0.1, 0.97),
        ALL_RIGHT | {"Tpos2I": False, "T2I": False, "group": False},
    ),
    "all equal": ((0.5, 0.5), (0.5, 0.5), dict.fromkeys(ALL_RIGHT, False)),
    "one caption for both": (
        (0.9, 0.8),
        (0.1, 0.2),
        ALL_RIGHT | {"Ineg2T": False, "I2T": False, "group": False},
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_the_seven_scores_are_the_makers(case: str) -> None:
    c0, c1, expected = GOLDEN[case]
    assert BiVLC().count(ITEM, answered(c0, c1), "likelihood") == expected


@pytest.mark.parametrize("case", GOLDEN)
def test_winogrounds_scores_are_the_same_under_their_own_names(case: str) -> None:
    c0, c1, expected = GOLDEN[case]
    assert Winoground().count(ITEM, answered(c0, c1), "likelihood") == {
        "text": expected["I2T"],
        "image": expected["T2I"],
        "group": expected["group"],
    }


def test_by_letters_each_order_shows_both_pictures_the_same_options() -> None:
    prompts = [question.prompt for question in two_by_two_questions(["x", "y"], PICTURES, "compodistill")]
    assert prompts[0] == prompts[3]
    assert prompts[1] == prompts[2]
    assert "(A) x\n (B) y" in prompts[0]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["A", "B", "A", "B"], (1, 1, 1)),
        (["A", "A", "A", "A"], (0.5, 0.5, 0)),  # always the same letter
        (["A", "B", "B", "A"], (1, 0, 0)),  # always the first caption
        (["A", "A", "B", "B"], (0.5, 0.5, 0.5)),  # right when (A) is the first caption
    ],
)
def test_by_letters_both_pictures_must_be_right_in_one_order(
    answers: list[str], expected: tuple[float, float, float]
) -> None:
    found = comparisons(answers, "compodistill")
    assert found[:3] == expected
    assert found[3:] == (None, None)
    assert BiVLC().count(ITEM, answers, "compodistill") == {
        "Ipos2T": expected[0],
        "Ineg2T": expected[1],
        "I2T": expected[2],
        "unread": 0.0,
    }
    assert Winoground().count(ITEM, answers, "compodistill") == {"text": expected[2], "unread": 0.0}


@pytest.mark.parametrize("suite", [BiVLC(), Winoground()])
def test_scores_across_pictures_are_by_vqascore_unless_another_way_is_named(suite: BiVLC | Winoground) -> None:
    assert suite.protocols[0] == "yes_probability"
