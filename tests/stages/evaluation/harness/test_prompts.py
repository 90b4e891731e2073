from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stages.evaluation.harness.prompts import load_image, to_prompt
from stages.unusable_sample import UnusableSample

RED, BLUE = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": [text(part) if isinstance(part, str) else image(part) for part in content]}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def image(url: object) -> dict[str, Any]:
    return {"type": "image", "url": url}


def test_images_stand_where_their_parts_stand() -> None:
    prompt = to_prompt("q", [user("First ", RED, "then ", BLUE, "which?")])
    assert prompt.turns == ({"from": "user", "value": "First <image>\nthen <image>\nwhich?"},)
    assert prompt.images == (RED, BLUE)


def test_images_stand_where_a_text_says_so() -> None:
    prompt = to_prompt("q", [user(RED, BLUE, "Is <image> like <image>?")])
    assert prompt.turns == ({"from": "user", "value": "Is <image> like <image>?"},)
    assert prompt.images == (RED, BLUE)


def test_earlier_turns_and_plain_texts_stay() -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        user(RED, "What?"),
        {"role": "assistant", "content": [text("A square.")]},
        {"role": "user", "content": "Why?"},
    ]
    prompt = to_prompt("q", messages)
    assert [turn["from"] for turn in prompt.turns] == ["system", "user", "assistant", "user"]
    assert [turn["value"] for turn in prompt.turns] == ["Be short.", "<image>\nWhat?", "A square.", "Why?"]
    assert prompt.images == (RED,)


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_what_is_neither_text_nor_image_is_refused_by_name(kind: str) -> None:
    message = {"role": "user", "content": [{"type": kind, "url": "a.mp4"}, text("What?")]}
    with pytest.raises(UnusableSample, match=f"document 3 of mvbench has a part of type {kind}; text and images"):
        to_prompt("document 3 of mvbench", [message])


def test_messages_that_end_with_no_question_are_refused() -> None:
    with pytest.raises(UnusableSample, match="q ends with a message of assistant; expected the user's question"):
        to_prompt("q", [user("What?"), {"role": "assistant", "content": "The answer is"}])
    with pytest.raises(UnusableSample, match="q has no message"):
        to_prompt("q", [])


def test_an_image_is_read_alike_as_a_file_as_bytes_and_as_an_image_of_pillow(tmp_path: Path) -> None:
    drawn = Image.new("RGBA", (9, 7), (255, 0, 0, 128))
    drawn.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    with Image.open(tmp_path / "a.png") as opened:
        read = [load_image(source, 1000, "ignore") for source in (tmp_path / "a.png", str(tmp_path / "a.png"), data)]
        read.append(load_image(opened, 1000, "ignore"))
    assert {image.mode for image in read} == {"RGB"}
    assert {image.getpixel((0, 0)) for image in read} == {(255, 127, 127)}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://example.org/a.png", "missing_image: no image at .*; addresses of the web are not read"),
        ({"bytes": b""}, "bad_image_field: an image is .*; expected an image of Pillow, or path or bytes"),
        (Image.new("RGB", (40, 40)), "image_too_large: 40x40 pixels, at most 1000"),
    ],
)
def test_an_image_that_cannot_be_read_is_refused_with_its_reason(source: object, message: str) -> None:
    with pytest.raises(UnusableSample, match=message):
        load_image(source, 1000, "ignore")
