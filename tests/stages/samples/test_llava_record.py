from typing import Any

import pytest

from stages.samples.layouts.images import ImageRef
from stages.samples.llava_record import parse_record, record_id
from stages.unusable_sample import UnusableSample
from tests.stages.samples.llava_data import record, turns

GOOD = record("x", "a.jpg")

BAD_RECORDS: dict[str, tuple[Any, str]] = {
    "a string": ("hello", "not_an_object"),
    "null": (None, "not_an_object"),
    "an id that is a list": ({**GOOD, "id": ["x"]}, "bad_id"),
    "an id that is true": ({**GOOD, "id": True}, "bad_id"),
    "an id that is a fraction": ({**GOOD, "id": 1.5}, "bad_id"),
    "half a surrogate pair in the id": ({**GOOD, "id": "\ud800"}, "bad_id"),
    "no conversation": ({"id": "x"}, "unknown_layout"),
    "an empty conversation beside none": ({"id": "x", "messages": None}, "empty_conversation"),
    "a conversation without turns": ({"id": "x", "conversations": []}, "empty_conversation"),
    "a conversation that is a string": ({"id": "x", "conversations": "hi"}, "empty_conversation"),
    "a system turn alone": (
        {"id": "x", "conversations": [{"from": "system", "value": "Be kind."}]},
        "empty_conversation",
    ),
    "a turn that is a string": ({"id": "x", "conversations": ["hi"]}, "bad_turn"),
    "a turn without text": ({"id": "x", "conversations": [{"from": "human"}]}, "bad_turn"),
    "a stranger's turn": ({"id": "x", "conversations": [{"from": "dog", "value": "wow"}]}, "unknown_role"),
    "half a surrogate pair": ({"id": "x", "conversations": turns("q", "\udc00")}, "not_utf8"),
    "an answer only": ({"id": "x", "conversations": turns("q", "a")[1:]}, "empty_conversation"),
    "two answers first": ({"id": "x", "conversations": turns("q", "a")[1:] * 2}, "wrong_turn_order"),
    "two questions in a row": (
        {"id": "x", "conversations": [*turns("q"), *turns("q", "a")]},
        "wrong_turn_order",
    ),
    "a question only": ({"id": "x", "conversations": turns("q")}, "answer_missing"),
    "a question at the end": ({"id": "x", "conversations": turns("q", "a", "q")}, "answer_missing"),
    "an empty answer": ({"id": "x", "conversations": turns("q", " \n")}, "answer_missing"),
    "an empty question": ({"id": "x", "conversations": turns("", "a")}, "question_missing"),
    "an image that is a number": ({**GOOD, "image": 3}, "bad_image_field"),
    "an image that is blank": ({**GOOD, "image": " "}, "bad_image_field"),
    "a null among the images": ({**GOOD, "image": ["a.jpg", None]}, "bad_image_field"),
    "a zero byte in a path": ({**GOOD, "image": "a\0.jpg"}, "bad_image_field"),
    "an absolute path": ({**GOOD, "image": "/etc/passwd"}, "path_leaves_folder"),
    "a path upwards": ({**GOOD, "image": "deep/../../a.jpg"}, "path_leaves_folder"),
    "an image nobody mentions": ({**record("x"), "image": "a.jpg"}, "image_without_placeholder"),
    "two images and one placeholder": ({**GOOD, "image": ["a.jpg", "b.png"]}, "image_without_placeholder"),
    "an image that is an address": ({**GOOD, "image": "https://host/a.jpg"}, "bad_image_field"),
    "a data URL without data": ({**GOOD, "image": "data:image/png;base64,"}, "bad_image_field"),
    "a data URL that is not base64": ({**GOOD, "image": "data:image/png;base64,a?b"}, "bad_image_field"),
    "a placeholder that only the dropped answer has": (
        {"image": "a.jpg", "conversations": [*turns("q", "<image>")[1:], *turns("q", "a")]},
        "image_without_placeholder",
    ),
    "two placeholders for one image": (
        {**GOOD, "conversations": turns("<image><image> q", "a")},
        "placeholder_without_image",
    ),
    "a placeholder in the answer": (
        {**GOOD, "conversations": turns("<image> q", "<image>")},
        "placeholder_misplaced",
    ),
    "a placeholder in the system turn": (
        {**GOOD, "system": "<image>", "conversations": turns("q", "a")},
        "placeholder_misplaced",
    ),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_each_bad_record_has_its_reason(case: str) -> None:
    value, reason = BAD_RECORDS[case]
    with pytest.raises(UnusableSample) as found:
        parse_record(value, 7)
    assert found.value.reason == reason
    assert found.value.detail


def test_the_stored_form_is_llavas_own_with_one_image_several_or_none() -> None:
    assert parse_record(GOOD, 0).as_json() == {
        "id": "x",
        "image": "a.jpg",
        "conversations": turns("<image>\nWhat is it?", "A cube."),
    }
    assert parse_record(record("x", ["a.jpg", "b.png"]), 0).as_json()["image"] == ["a.jpg", "b.png"]
    assert "image" not in parse_record(record("x"), 0).as_json()


def test_a_placeholder_may_stand_anywhere_in_any_question() -> None:
    value = {**GOOD, "conversations": turns("What is in <image> here?", "A cube.", "Which colour?", "Red.")}
    assert len(parse_record(value, 0).turns) == 4
    later = {"image": ["a.jpg", "b.png"], "conversations": turns("<image>\nWhat?", "Red.", "And <image>?", "Blue.")}
    assert parse_record(later, 0).as_json() == {"id": "0", **later}


def test_without_images_the_word_of_a_placeholder_is_text_wherever_it_stands() -> None:
    value = {"system": "<image>", "conversations": turns("What is <image> in HTML?", "<image> is no tag.")}
    found = parse_record(value, 0)
    assert [text for _, text in found.turns] == ["<image>", "What is <image> in HTML?", "<image> is no tag."]
    assert found.images == ()
    assert found.has_placeholder_as_text


def test_an_answer_before_the_first_question_is_dropped() -> None:
    value = {"system": "Be brief.", "conversations": [*turns("q", "Hello!")[1:], *turns("<image>", "a")], "image": "a"}
    found = parse_record(value, 0)
    assert [role for role, _ in found.turns] == ["system", "human", "gpt"]
    assert found.dropped_answer
    assert not parse_record(GOOD, 0).dropped_answer


def test_chat_roles_are_read_as_llava_roles_and_a_system_turn_may_come_first() -> None:
    value = {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "user", "value": "Hello?"},
            {"from": "assistant", "value": "Hello."},
        ]
    }
    assert [role for role, _ in parse_record(value, 0).turns] == ["system", "human", "gpt"]


@pytest.mark.parametrize("absent", [None, "", []])
def test_an_empty_image_field_means_text_only(absent: Any) -> None:
    assert parse_record({**record("x"), "image": absent, "video": absent, "weight": absent}, 0).images == ()


def test_two_spellings_of_a_path_are_one_image() -> None:
    assert parse_record(record("x", "./deep//c.webp"), 0).images == (ImageRef("deep/c.webp"),)


def test_an_integer_id_becomes_a_string_and_a_missing_one_the_ordinal() -> None:
    assert parse_record(record(12), 3).id == "12"
    assert parse_record({"conversations": turns("q", "a")}, 3).id == "3"
    assert record_id("not a record", 3) is None
    assert parse_record({**record(""), "id": ""}, 3).id == "3"
    assert not parse_record({**record(""), "id": ""}, 3).has_own_id
