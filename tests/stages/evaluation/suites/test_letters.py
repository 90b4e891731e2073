import pytest

from stages.evaluation.suites.letters import first_word_of, leading_or_lone_letter, mmvp_letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(b) onto", "B"),
        ("C. on", "C"),
        ("The answer is D.", "D"),
        ("Answer: A", "A"),
        ("a knife is on the apple", None),
        ("on the table", None),
        ("Bananas", None),
        ("E", None),
        ("", None),
    ],
)
def test_a_letter_is_read_in_front_or_where_it_stands_alone(answer: str, letter: str | None) -> None:
    assert leading_or_lone_letter(answer, "ABCD") == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A", "A"),
        ("A.", "A"),
        ("(A)", "A"),
        ("A answer", "A"),
        ("The answer is A", "A"),
        ("Option B", "B"),
        ("(b) Open", "B"),
        ("It is a cat", "A"),
        ("grab it", "B"),
        ("Banana", "A"),
        ("Bolt", "B"),
        ("Closed", None),
        ("", None),
    ],
)
def test_letters_of_mmvp_are_read_as_lmms_eval_does(answer: str, letter: str | None) -> None:
    assert mmvp_letter(answer) == letter


@pytest.mark.parametrize(
    ("answer", "is_yes"),
    [("Yes.", True), ("NO", False), ("No, yes", False), ("yes or no", True), ("Nope", None), ("yesterday", None)],
)
def test_the_earlier_whole_word_counts(answer: str, is_yes: bool | None) -> None:
    assert first_word_of(answer, "yes", "no") is is_yes


def test_letters_count_like_words() -> None:
    assert first_word_of("The answer is B", "A", "B") is False
    assert first_word_of("a is B", "A", "B") is True
