"""A tokenizer.json of a stranger: rules that would fill memory are refused, patterns that give up skip one sample."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stages.checkpoints.configs import load_config
from stages.checkpoints.processors import load_processor, load_tokenizer
from stages.conversations.encoder import ConversationEncoder
from stages.unusable_sample import UnusableSample
from storage.errors import UserError
from tests.checkpoints import make_tiny_llava


@pytest.fixture
def with_rules(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    def make(rules: dict[str, Any]) -> Path:
        file = make_tiny_llava(tmp_path / "llava") / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | rules))
        return file.parent

    return make


def replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


@pytest.mark.parametrize("reader", [load_processor, load_tokenizer])
@pytest.mark.parametrize(
    "rules",
    [
        {"normalizer": {"type": "Sequence", "normalizers": [replace("a", "a" * 10)] * 9}},
        {"normalizer": replace("a", "b" * 10**6)},
        {"decoder": {"type": "Sequence", "decoders": [replace("a", "a" * 10)] * 9}},
    ],
)
def test_replacements_that_make_gigabytes_of_a_word_are_refused(
    with_rules: Callable[[dict[str, Any]], Path], rules: dict[str, Any], reader: Callable[[Path], object]
) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json replaces one character by up to"):
        reader(with_rules(rules))


def test_a_pattern_that_gives_up_on_a_text_makes_that_sample_unusable(
    with_rules: Callable[[dict[str, Any]], Path],
) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    folder = with_rules({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}})
    encoder = ConversationEncoder(load_processor(folder), load_config(folder).image_token_id, 1000)
    picture = Image.new("RGB", (32, 32))
    assert len(encoder.encode_pair("What is it?", "A square.", [picture]).token_ids)
    with pytest.raises(UnusableSample, match="refused_by_processor: the tokenizer gave up"):
        encoder.encode_pair("a" * 60 + "!", "A square.", [picture])


@pytest.mark.parametrize("setting", ["truncation", "padding"])
def test_truncation_and_padding_of_a_file_are_not_used(
    with_rules: Callable[[dict[str, Any]], Path], setting: str
) -> None:
    padding = {"direction": "Right", "pad_to_multiple_of": 10**12, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    rules: dict[str, Any] = {
        "truncation": {"direction": "Right", "max_length": 10**12, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 10**12}, **padding},
    }
    tokenizer = load_tokenizer(with_rules({setting: rules[setting]}))
    assert len(tokenizer("What is it?")["input_ids"]) < 20
