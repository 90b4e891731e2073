"""Every layout of docs/data.md becomes the same LLaVA record; the rest is refused with the key in the way."""

import base64
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from stages.samples.llava_record import LlavaRecord, parse_record
from stages.unusable_sample import UnusableSample
from tests.docs.markdown import PAGES
from tests.stages.samples.llava_data import image_bytes, turns

PNG = image_bytes()
NAME_OF_PNG = f"sha256:{sha256(PNG).hexdigest()}"
DATA_URL = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
ROOT = Path("/data/images")


def messages(question: Any, answer: Any = "red", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def part(kind: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, **more}


WHAT, RED = part("text", text="What?"), [part("text", text="red")]

OF_ONE_IMAGE: dict[str, dict[str, Any]] = {
    "LLaVA": {"image": "a.png", "conversations": turns("<image>\nWhat?", "red")},
    "a list of one": {"image": ["a.png"], "conversations": turns("<image>\nWhat?", "red")},
    "images": {"images": ["a.png"], "conversations": turns("<image>\nWhat?", "red")},
    "images that no turn names": {"images": ["a.png"], "conversations": turns("What?", "red")},
    "an absolute path": {"image": "/data/images/a.png", "conversations": turns("<image>\nWhat?", "red")},
    **{
        f"the file URL {url}": {"image": url, "conversations": turns("<image>\nWhat?", "red")}
        for url in (
            "file:///data/images/a.png",
            "file://localhost/data/images/a.png",
            "FILE:/data/images/%61.png",
            "file://a.png",
        )
    },
    "a path in a table's image": {
        "image": {"bytes": None, "path": "a.png"},
        "conversations": turns("<image>\nWhat?", "red"),
    },
    "messages": messages("<image>\nWhat?", images=["a.png"]),
    "messages without a placeholder": messages("What?", images=["a.png"]),
    "messages with one image": messages("What?", image="a.png"),
    "roles in conversations": {"image": "a.png", "conversations": messages("<image>\nWhat?")["messages"]},
    "a part with a path": messages([part("image", image="a.png"), WHAT], RED),
    "a part with a URL": messages([part("image_url", image_url={"url": "file:///data/images/a.png"}), WHAT], RED),
    "a part with a plain URL": messages([part("image_url", image_url="a.png"), WHAT], RED),
    "parts without a type": messages([{"image": "a.png"}, {"text": "What?"}], RED),
    "a part for an image of the list": messages([part("image"), WHAT], RED, images=["a.png"]),
    "parts of a table": messages(
        [part("image", text=None, index=0), part("text", text="What?", index=None)], RED, images=["a.png"]
    ),
    "an image in the part and in the list": messages([part("image", image="a.png"), WHAT], RED, images=["a.png"]),
    "texts": {"images": ["a.png"], "texts": [{"user": "What?", "assistant": "red", "source": "s"}]},
    "texts as an object of lists": {"images": ["a.png"], "texts": {"user": ["What?"], "assistant": ["red"]}},
}


def nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


def stored(value: dict[str, Any]) -> dict[str, object]:
    return parse_record(value, 0, ROOT).as_json()


@pytest.mark.parametrize("layout", OF_ONE_IMAGE)
def test_every_layout_becomes_the_same_record(layout: str) -> None:
    wanted = {"id": "0", "image": "a.png", "conversations": turns("<image>\nWhat?", "red")}
    assert stored(OF_ONE_IMAGE[layout]) == wanted


@pytest.mark.parametrize("example", PAGES["docs/data.md"].blocks("json"))
def test_every_example_of_the_documentation_is_read_whole(example: str) -> None:
    value = json.loads(example)
    found = parse_record(value, 0)
    assert not found.unread
    assert len(found.images) == sum(text.count("<image>") for _, text in found.turns)
    assert bool(found.images) == ("system" not in value)


@pytest.mark.parametrize(
    "image", [PNG, DATA_URL, DATA_URL.replace("image/png", ""), {"bytes": PNG, "path": "x.png"}, {"url": DATA_URL}]
)
def test_an_image_that_the_record_holds_is_named_by_its_digest(image: Any) -> None:
    for value in (
        {"images": [image], "texts": [{"user": "What?", "assistant": "red"}]},
        messages([part("image", image=image), WHAT]),
        {"image": image, "conversations": turns("<image>\nWhat?", "red")},
    ):
        (found,) = parse_record(value, 0).images
        assert (found.name, found.data) == (NAME_OF_PNG, PNG)
        assert stored(value)["image"] == NAME_OF_PNG


def test_images_of_several_turns_keep_their_order() -> None:
    both = [part("image", image="b.png"), part("text", text="And "), part("image", image="a.png")]
    value = messages([part("text", text="Is "), part("image", image="a.png"), part("text", text="like\n")])
    value["messages"] += messages(both)["messages"]
    assert stored(value) == {
        "id": "0",
        "image": ["a.png", "b.png", "a.png"],
        "conversations": turns("Is <image>\nlike\n", "red", "<image>\nAnd <image>\n", "red"),
    }


def test_questions_of_a_row_become_one_conversation() -> None:
    texts = [{"user": "What?", "assistant": "red"}, {"user": "Where?", "assistant": "left"}]
    value = {"images": ["a.png", "b.png"], "texts": texts}
    assert stored(value)["conversations"] == turns("<image>\n<image>\nWhat?", "red", "Where?", "left")
    assert stored({"images": None, "texts": texts})["conversations"] == turns("What?", "red", "Where?", "left")


def test_a_system_text_is_a_field_or_the_first_turn() -> None:
    first = {"role": "System", "content": "Be brief."}
    as_turn = {"messages": [first, *messages("q")["messages"]]}
    for value in (messages("q", system="Be brief."), as_turn, {**as_turn, "system": "Be brief."}):
        assert stored(value)["conversations"] == [{"from": "system", "value": "Be brief."}, *turns("q", "red")]
    assert reason({**as_turn, "system": "Be long."}) == ("bad_turn", "the field system and the system turn differ")


@pytest.mark.parametrize(("human", "gpt"), [("HUMAN", "GPT"), ("User", "Assistant"), ("user", "chatgpt")])
def test_roles_are_read_in_any_case(human: str, gpt: str) -> None:
    value = {"conversations": [{"from": human, "value": "q"}, {"from": gpt, "value": "a"}]}
    assert stored(value)["conversations"] == turns("q", "a")


LEARNED = turns("q", "a")

UNREAD: dict[str, tuple[dict[str, Any], str]] = {
    "video": ({"video": "a.mp4", "conversations": turns("<video>\nq", "a")}, "video"),
    "videos": (messages("q", videos=["a.mp4"]), "videos"),
    "audios": (messages("q", audios=["a.wav"]), "audios"),
    "tools": (messages("q", tools="[{}]"), "tools"),
    "preferences": (messages("q", chosen="a", rejected="b"), "chosen"),
    "an image of another name": (messages("q", image_path="a.png"), "image_path"),
    "bytes of another name": (messages("q", thumbnail=PNG), "thumbnail"),
    "images of another name": (messages("q", pages=[{"bytes": PNG, "path": None}]), "pages"),
    "another case": (messages("q", Images=["a.png"]), "Images"),
    "a weight of the record": (messages("q", weight=0.5), "weight"),
    "a weight of an answer": ({"conversations": [LEARNED[0], {**LEARNED[1], "weight": 0}]}, "weight of turn 1"),
    "no loss on an answer": ({"conversations": [LEARNED[0], {**LEARNED[1], "loss": False}]}, "loss of turn 1"),
    "loss on a question": ({"conversations": [{**LEARNED[0], "loss": True}, LEARNED[1]]}, "loss of turn 0"),
    "images of a turn": ({"messages": [{"role": "user", "content": "q", "images": ["a"]}]}, "images of turn 0"),
    "a call of a tool": ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "tool_calls of turn 0"),
    "a part of another type": (messages([part("video", video="a.mp4")]), "video of part of turn 0"),
    "a part of a type of its own": (messages([part("box", box=[1])]), "'box'"),
    "pixels of an image": (messages([part("image", image={"url": "a.png", "min_pixels": 9})]), "of image of turn 0"),
    "pixels of a record's image": (messages("q", image={"path": "a.png", "max_pixels": 9}), "max_pixels of image"),
    "pixels of a part": (messages([part("image", image="a.png", max_pixels=9)]), "max_pixels of part of turn 0"),
    "an image of a further name": (messages("q", image_1="a.png"), "image_1"),
    "a video of a further name": (messages("q", video_file="a.mp4"), "video_file"),
    "a rejected conversation": (messages("q", rejected_messages=LEARNED), "rejected_messages"),
    "an ignored answer": ({"conversations": [LEARNED[0], {**LEARNED[1], "ignore_loss": 1}]}, "ignore_loss of turn 1"),
    "an image beside a text": (messages([{"text": "q", "image": "a.png"}]), "image beside text"),
    "an image in a part of text": (messages([part("text", text="q", image="a.png")]), "image beside text"),
    "a text in a part of an image": (messages([part("image", text="q")], images=["a.png"]), "text beside it"),
    "a second image in a part": (messages([part("image", image="a.png", url="b.png")]), "url beside image"),
    "a second text in a turn": ({"messages": [{"role": "user", "content": "q", "value": "p"}]}, "content of a turn"),
    "two conversations": (messages("q", conversations=LEARNED), "messages beside conversations"),
    "two images": (messages("q", image="a.png", images=["b.png"]), "images beside image"),
}


def reason(value: dict[str, Any]) -> tuple[str, str]:
    with pytest.raises(UnusableSample) as found:
        parse_record(value, 0, ROOT)
    return found.value.reason, found.value.detail


@pytest.mark.parametrize("case", UNREAD)
def test_a_key_that_changes_what_is_learned_is_named_and_not_ignored(case: str) -> None:
    value, key = UNREAD[case]
    found, detail = reason(value)
    assert found == "unread_field"
    assert key in detail


def unread(value: dict[str, Any]) -> frozenset[str]:
    found: LlavaRecord = parse_record(value, 0)
    return found.unread


def test_other_keys_are_collected() -> None:
    value: dict[str, Any] = {"source": "s", "empty": [], "width": 3, "weight": 1.0, "é": 1, "conversations": LEARNED}
    value["conversations"] = [{**LEARNED[0], "loss": 0, "time": 5}, {**LEARNED[1], "loss": True, "weight": 1}]
    assert unread(value) == {"source", "width", "turn.time", "é"}
    assert unread(messages([part("text", text="q", cache=1)])) == {"part.cache"}
    of_images = {"path": "a.png", "detail": "low", "note": None}
    assert unread(messages([part("image_url", image_url=of_images)])) == {"image.detail"}
    assert unread(messages("q", images=[of_images])) == {"image.detail"}
    rated = {"image_1": 0.5, "image_correspondence_ratings": [4, 5], "image_id": "17", "video_length": 3.5}
    assert unread(messages("q", **rated)) == set(rated)


def test_keys_are_shown_in_their_own_letters_and_with_escapes_for_what_is_not_seen() -> None:
    keys = {
        "题目": "题目",
        "a\x1b[2J": r"a\x1b[2J",
        "\u202eb": r"\u202eb",
        "\ud800": r"\ud800",
        "猫" * 99: "猫" * 77 + "...",
    }
    assert unread(messages("q", **dict.fromkeys(keys, 1))) == set(keys.values())
    assert reason(messages("q", **{"\x1bÜ": PNG}))[1].startswith(r"\x1bÜ is not read")
    assert "the keys 题目, b\\n;" in reason({"题目": 1, "b\n": 2})[1]


NOTHING: dict[str, Any] = {
    "an image of a table": {"image": {"bytes": None, "path": None}},
    "images of nothing": {"images": [None]},
    "images of a table": {"images": [{"bytes": None, "path": ""}, None]},
    "no image": {"image": False},
    "no tools": {"tools": False},
    "tools of nothing": {"tools": [{"function": None}]},
    "a video of a table": {"video": {"bytes": None, "path": None}},
    "no system text": {"system": [None]},
    "preferences of a table": {"chosen": [{"role": None, "content": None}]},
    "another conversation of nothing": {"conversations": [None]},
    "values nested deep": {"audio": nested(100_000)},
}


@pytest.mark.parametrize("case", NOTHING)
def test_what_holds_nothing_is_absent_and_is_not_counted(case: str) -> None:
    found = parse_record(messages("q", **NOTHING[case]), 0)
    assert found.as_json() == {"id": "0", "conversations": turns("q", "red")}
    assert not found.unread


@pytest.mark.parametrize("key", ["chosen", "enable_thinking", "kto_tag", "rejected", "train", "loss"])
def test_false_is_not_nothing_under_a_key_that_switches_or_judges(key: str) -> None:
    assert reason(messages("q", **{key: False}))[0] == "unread_field"


@pytest.mark.parametrize("loss", [{"weight": 0}, {"weight": 1}, {"loss": False}, {"ignore_loss": True}, {"train": 0.5}])
def test_an_answer_before_the_first_question_is_left_out_whatever_its_weight(loss: dict[str, Any]) -> None:
    hello = {"role": "assistant", "content": "Hello", **loss}
    for before in ([], [{"role": "system", "content": "Be brief."}]):
        found = parse_record({"messages": [*before, hello, *messages("q")["messages"]]}, 0)
        assert found.dropped_answer
        assert [role for role, _ in found.turns][-2:] == ["human", "gpt"]


def test_an_index_of_an_image_part_is_a_number_and_the_next() -> None:
    for index in (1, "0"):
        value = messages([part("image", index=index), part("text", text="q")], images=["a.png", "b.png"])
        found, detail = reason(value)
        assert found == "bad_image_field"
        assert "expected 0, the next" in detail


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "more placeholders than images": (messages("<image><image>", images=["a.png"]), "placeholder_without_image"),
    "more images than placeholders": (messages("<image>", images=["a.png", "b.png"]), "image_without_placeholder"),
    "more images than parts": (messages([part("image"), WHAT], images=["a.png", "a.png"]), "image_without_placeholder"),
    "a part without an image": (messages([part("image"), WHAT]), "placeholder_without_image"),
    "a part and the word beside it": (
        messages([part("image", image="a.png"), part("text", text="<image>")]),
        "placeholder_without_image",
    ),
    "an index out of order": (messages([part("image", index=1)], images=["a.png", "b.png"]), "bad_image_field"),
    "an image in an answer": (messages("q", [part("image", image="a.png")]), "placeholder_misplaced"),
    "an absolute path elsewhere": (messages([part("image", image="/data/other/a.png")]), "path_leaves_folder"),
    "a file URL elsewhere": (messages("q", image="file:///data/a.png"), "path_leaves_folder"),
    "a file URL upwards": (messages("q", image="file:///data/images/%2e%2e/a.png"), "path_leaves_folder"),
    "a file URL with a zero byte": (messages("q", image="file://a%00.png"), "bad_image_field"),
    "a file URL that is not UTF-8": (messages("q", image="file://a%ff.png"), "bad_image_field"),
    "an absolute path upwards": (messages([part("image", image="/data/images/../a.png")]), "path_leaves_folder"),
    "a text that is a number": (messages([part("text", text=3)]), "bad_turn"),
    "content that is a number": (messages(3), "bad_turn"),
    "a part that is a number": (messages([3]), "bad_turn"),
    "a system that is a list": (messages("q", system=["Be brief."]), "bad_turn"),
    "a pair without an answer": ({"texts": [{"user": "q"}]}, "bad_turn"),
    "a pair with an empty answer": ({"texts": [{"user": "q", "assistant": ""}]}, "answer_missing"),
    "columns of other lengths": ({"texts": {"user": ["q", "q"], "assistant": ["a"]}}, "bad_turn"),
    "half a surrogate pair in a part": (messages([part("text", text="\ud800")]), "not_utf8"),
    "half a surrogate pair in the system text": (messages("q", system="\ud800"), "bad_turn"),
    "turns nested too deep": ({"conversations": [nested(100_000)]}, "bad_turn"),
    "a tool's turn": ({"messages": [{"role": "tool", "content": "a"}]}, "unknown_role"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_has_its_reason(case: str) -> None:
    value, wanted = BAD[case]
    assert reason(value)[0] == wanted
