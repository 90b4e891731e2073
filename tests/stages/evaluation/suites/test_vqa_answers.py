import pytest

from stages.evaluation.suites.vqa_answers import (
    evalai_accuracy,
    evalai_answer,
    soft_accuracy,
    vqa_answer,
    vqa_v2_accuracy,
)

GOLDEN = {
    "A Red  Car.": "red car",
    "1,000 dollars": "1000 dollars",
    "it's John's": "it 's john 's",
    "dont know": "don't know",
    "three": "3",
    "none": "0",
    "St. Mary's": "st mary 's",
    "3.5": "3.5",
    "u.s.a.": "usa",
    "left-hand": "left hand",
    "left - hand": "left hand",
    "yes/no": "yes no",
    '"Stop!"': "stop",
    "a, b": "b",
    "the the": "",
    "$5.00": "$5.00",
    "10:30 a.m.": "10:30 am",
    "hello?world": "helloworld",
    "Im fine": "im fine",
}
"""What the published processors make of these."""


@pytest.mark.parametrize(("text", "processed"), GOLDEN.items())
def test_answers_are_processed_as_evalai_does(text: str, processed: str) -> None:
    assert evalai_answer(text) == processed


def test_a_form_that_lacks_any_one_of_its_apostrophes_gets_it_back() -> None:
    forms = ["aint", "couldntve", "couldnt've", "couldn'tve", "yall'd've", "y'alld've", "y'all'dve", "'ows'at", "twas"]
    restored = ["ain't", "couldntve", "couldn't've", "couldn't've", *["y'all'd've"] * 3, "'ow's'at", "'twas"]
    assert [vqa_answer(form) for form in forms] == restored
    assert vqa_answer("somebody'd") == "somebodyd"
    assert vqa_answer("ive") == "ive"


def test_only_so_many_periods_are_dropped() -> None:
    assert vqa_answer("a" + "." * 40) == "a" + "." * 8


def test_numbers_keep_their_points_and_lose_their_commas() -> None:
    assert vqa_answer("1,000.5 km") == "1000.5 km"
    assert vqa_answer("b,c") == "b c"


@pytest.mark.parametrize(
    ("given", "answer", "accuracy"),
    [
        ({"red": 10}, "Red", 1.0),
        ({"red": 3, "blue": 7}, "red", 0.9),
        ({"red": 3, "blue": 7}, "blue.", 1.0),
        ({"red": 2, "blue": 8}, "red", 0.6),
        ({"red": 1, "blue": 9}, "red", 0.3),
        ({"red": 4, "blue": 6}, "red", 1.0),
        ({"red": 10}, "green", 0.0),
    ],
)
def test_the_soft_accuracy_leaves_out_one_person_at_a_time(given: dict[str, int], answer: str, accuracy: float) -> None:
    people = [word for word, count in given.items() for _ in range(count)]
    assert evalai_accuracy(answer, people) == pytest.approx(accuracy)


def test_the_soft_accuracy_itself_compares_texts_as_they_are() -> None:
    assert soft_accuracy("Red", ["red"] * 10) == 0


@pytest.mark.parametrize("text", ["t-shirt", "two", "the beach", "no.", "men's", "Yes", "1,000"])
def test_a_word_for_word_copy_of_what_all_say_is_right_in_vqa_v2(text: str) -> None:
    assert vqa_v2_accuracy(text, [text.lower()] * 10) == 1


def test_vqa_v2_processes_both_sides_alike() -> None:
    assert vqa_v2_accuracy("The dog.", ["dog"] * 10) == 1
    assert vqa_v2_accuracy("The dog.", ["the dog"] * 9 + ["cat"]) == 1
    assert vqa_v2_accuracy("two", ["2"] * 2 + ["two"] * 1 + ["three"] * 7) == pytest.approx(0.9)
