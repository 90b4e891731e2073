import pytest

from stages.conversations.messages import to_messages
from stages.conversations.turns import Turn
from stages.unusable_sample import UnusableSample

IMAGE = {"type": "image"}


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def test_images_of_several_turns_stand_where_each_turn_names_them() -> None:
    turns = [
        Turn("human", "<image>\nWhat?"),
        Turn("gpt", "Red."),
        Turn("human", "And <image>\n?"),
        Turn("gpt", "Blue."),
    ]
    assert [message["content"] for message in to_messages(turns, 2)] == [
        [IMAGE, text("What?")],
        [text("Red.")],
        [text("And "), IMAGE, text("?")],
        [text("Blue.")],
    ]


def test_without_images_the_word_of_a_placeholder_stays_text() -> None:
    turns = [Turn("human", "What is <image>\n in HTML?"), Turn("gpt", "<image> is no tag.")]
    assert [message["content"] for message in to_messages(turns, 0)] == [[text(said)] for _, said in turns]


def test_placeholders_and_images_agree_in_number_where_there_are_images() -> None:
    with pytest.raises(UnusableSample, match="placeholder_without_image"):
        to_messages([Turn("human", "<image> <image>")], 1)
    with pytest.raises(UnusableSample, match="image_without_placeholder"):
        to_messages([Turn("human", "What?")], 1)
