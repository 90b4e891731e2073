import pytest
from PIL import Image
from pydantic import ValidationError

from pipeline.lmms_eval.requests import decoding_of, prompt_of_text
from stages.evaluation.harness.prompted_model import DecodingConfig

RED = Image.new("RGB", (8, 8), "red")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, DecodingConfig()),
        (
            {"max_new_tokens": 16, "temperature": 0, "top_p": None},
            DecodingConfig(max_new_tokens=16),
        ),
        ({"temperature": 0.2}, DecodingConfig(temperature=0.2)),
        ({"temperature": 0.2, "do_sample": True, "top_p": 0.9}, DecodingConfig(temperature=0.2, top_p=0.9)),
        ({"temperature": 0.2, "do_sample": False}, DecodingConfig()),
        ({"num_beams": 3}, DecodingConfig(num_beams=3)),
        # lmms-eval gives this to every task that names nothing.
        ({"until": ["\n\n"]}, DecodingConfig()),
        ({"until": "Q:"}, DecodingConfig(stop=("Q:",))),
        ({"until": ["\n\n", "Q:", ""]}, DecodingConfig(stop=("Q:",))),
    ],
)
def test_generation_settings_of_a_task_are_read(settings: dict[str, object], expected: DecodingConfig) -> None:
    assert decoding_of(settings) == (expected, [])


def test_generation_settings_that_are_not_read_are_named() -> None:
    decoding, unread = decoding_of({"max_new_tokens": 3, "seed": 1, "image_aspect_ratio": "pad"})
    assert decoding == DecodingConfig(max_new_tokens=3)
    assert unread == ["image_aspect_ratio", "seed"]


def test_a_setting_of_no_sense_is_refused() -> None:
    with pytest.raises(ValidationError, match="max_new_tokens"):
        decoding_of({"max_new_tokens": 0})


def test_pictures_stand_before_a_text_that_does_not_place_them() -> None:
    assert prompt_of_text("q", "What?", [RED, None]).turns == ({"from": "user", "value": "<image>\nWhat?"},)
    assert prompt_of_text("q", "Is <image> red?", [RED]).turns == ({"from": "user", "value": "Is <image> red?"},)
    assert prompt_of_text("q", "What?", None).images == ()
