"""Conversations whose later images do not fit: what is left of them is a shorter conversation, read as such."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from stages.checkpoints.processors import load_processor
from stages.conversations.cuts import answer_runs, part_with_images
from stages.conversations.encoder import NO_LIMIT, ConversationEncoder, EncodedConversation
from stages.families.batch import pixels_of
from stages.families.registry import FAMILIES
from stages.unusable_sample import UnusableSample
from storage.samples.image_settings import ImageConfig
from storage.targets.manifest import Cut
from tests.checkpoints import CHAT_TEMPLATE_WITHOUT_GENERATION, draw_random_image, load_tiny_llava, make_tiny_llava
from tests.tiny_families import RECIPES, make_tiny_family

Turns = list[dict[str, str]]

TEXTS = {
    "an image a turn": [
        "<image>\nWhat?",
        "Red.",
        "And <image>\n?",
        "A blue one.",
        "<image>",
        "So it is.",
        "Why?",
        "So.",
    ],
    "text first": [
        "Hello?",
        "Yes, hello.",
        "<image>What?",
        "A red square.",
        "And <image>?",
        "A circle.",
        "Why?",
        "So.",
    ],
    "two at once": ["<image>\n<image>\nSame?", "No.", "Sure?", "Yes, sure.", "And <image>?", "The same."],
}
CONVERSATIONS: dict[str, Turns] = {
    name: [{"from": ("human", "gpt")[turn % 2], "value": text} for turn, text in enumerate(texts)]
    for name, texts in TEXTS.items()
}


def images_of(turns: Turns) -> list[Image.Image]:
    rng, sizes = random.Random(0), [(64, 40), (30, 90), (64, 64)]
    count = sum(turn["value"].count("<image>") for turn in turns)
    return [draw_random_image(rng).resize(size, Image.Resampling.NEAREST) for size in sizes[:count]]


def prefixes(encoder: ConversationEncoder, turns: Turns) -> list[EncodedConversation]:
    """Each prefix of the turns that ends with an answer, with its images only, up to that answer's last token."""
    found = []
    for size in range(2, len(turns) + 1, 2):
        part = turns[:size]
        read = encoder.encode(part, images_of(part))
        end = answer_runs(read.answer_mask)[-1][1]
        found.append(replace(read, token_ids=read.token_ids[:end], answer_mask=read.answer_mask[:end]))
    return found


def assert_same(found: EncodedConversation, expected: EncodedConversation) -> None:
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    assert found.answer_mask.tolist() == expected.answer_mask.tolist()
    assert found.image_positions.tolist() == expected.image_positions.tolist()
    assert found.num_images == expected.num_images
    assert found.pixel_inputs.keys() == expected.pixel_inputs.keys()
    for name, pixels in expected.pixel_inputs.items():
        assert torch.equal(found.pixel_inputs[name], pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def processor(folder: Path) -> Any:
    return load_tiny_llava(folder)[1]


@pytest.mark.parametrize("position", ["front", "as_written"])
@pytest.mark.parametrize("prefixes_only", [False, True])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_at_every_length_the_longest_prefix_of_whole_turns_that_fits_is_left(
    name: str, prefixes_only: bool, position: Any, processor: Any
) -> None:
    if prefixes_only:
        processor.chat_template = CHAT_TEMPLATE_WITHOUT_GENERATION
    turns, reading = CONVERSATIONS[name], ImageConfig(position=position)
    images = images_of(turns)
    unlimited = ConversationEncoder(processor, processor.image_token_id, NO_LIMIT, images=reading)
    parts, whole = prefixes(unlimited, turns), unlimited.encode(turns, images)
    wholes = [end for _, end in answer_runs(whole.answer_mask)]
    for length in range(8, len(whole.token_ids)):
        encoder = ConversationEncoder(processor, processor.image_token_id, length, images=reading)
        fitting = [number for number, end in enumerate(wholes) if end <= length]
        if not fitting:
            with pytest.raises(UnusableSample) as caught:
                encoder.encode(turns, images)
            first = whole.image_positions[whole.image_positions < answer_runs(whole.answer_mask)[0][0]].tolist()
            fits = not first or first[-1] < length
            assert caught.value.reason == ("too_long" if fits else "image_beyond_max_length")
            continue
        found, expected = encoder.encode(turns, images), parts[fitting[-1]]
        assert_same(found, replace(expected, pixel_inputs=found.pixel_inputs, num_images=found.num_images))
        assert found.num_images == found.pixel_inputs.get("pixel_values", torch.zeros(0)).shape[0]
        assert_same(found, expected)
        assert found.num_cut_images == len(images) - found.num_images
        assert found.num_cut_tokens == len(whole.token_ids) - len(found.token_ids)
        assert found.num_cut_answer_tokens == int(whole.answer_mask.sum() - found.answer_mask.sum())


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_cut_inside_an_answer_takes_a_turn_whose_image_does_not_fit_and_all_after_it(
    name: str, processor: Any
) -> None:
    turns, reading = CONVERSATIONS[name], ImageConfig(position="as_written")
    images = images_of(turns)
    whole = ConversationEncoder(processor, processor.image_token_id, NO_LIMIT, images=reading).encode(turns, images)
    answers, last_image = answer_runs(whole.answer_mask), int(whole.image_positions[-1])
    for length in range(answers[0][0] + 1, len(whole.token_ids)):
        encoder = ConversationEncoder(processor, processor.image_token_id, length, cut="tokens", images=reading)
        found = encoder.encode(turns, images)
        end = length
        if last_image >= length:
            end = min(length, max(end for start, end in answers if start < length))
        assert found.token_ids.tolist() == whole.token_ids[:end].tolist()
        assert found.answer_mask.tolist() == whole.answer_mask[:end].tolist()
        assert found.num_cut_tokens == len(whole.token_ids) - end
        assert found.num_cut_answer_tokens == int(whole.answer_mask[end:].sum())
        assert len(found.image_positions) == 16 * found.num_images == int((whole.image_positions < end).sum())


@pytest.mark.parametrize("cut", ["whole_turns", "tokens"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_turns_and_images_that_were_read_are_found_again_from_what_is_stored(
    name: str, cut: Cut, processor: Any
) -> None:
    turns = CONVERSATIONS[name]
    images = images_of(turns)
    unlimited = ConversationEncoder(processor, processor.image_token_id, NO_LIMIT)
    whole, seen = unlimited.encode(turns, images), set()
    for length in range(answer_runs(whole.answer_mask)[0][1], len(whole.token_ids) + 1):
        read = ConversationEncoder(processor, processor.image_token_id, length, cut=cut).encode(turns, images)
        part, num_images = part_with_images(turns, len(images), read.answer_mask, read.num_cut_answer_tokens)
        assert num_images == read.num_images
        again = unlimited.encode(part, images[:num_images])
        assert again.token_ids[: len(read.token_ids)].tolist() == read.token_ids.tolist()
        seen.add(num_images)
    assert len(seen) > 1


@pytest.mark.parametrize("model_type", RECIPES)
def test_every_family_reads_a_cut_sample_as_the_shorter_conversation(model_type: str, tmp_path: Path) -> None:
    processor = load_processor(make_tiny_family(tmp_path / "teacher", model_type))
    image_token_id = processor.tokenizer.convert_tokens_to_ids(RECIPES[model_type].image_token)
    turns, family = CONVERSATIONS["an image a turn"], FAMILIES[model_type]
    images = images_of(turns)
    unlimited = ConversationEncoder(processor, image_token_id, NO_LIMIT)
    parts, seen = prefixes(unlimited, turns), set()
    for length in range(len(parts[0].token_ids), len(parts[-1].token_ids), 3):
        found = ConversationEncoder(processor, image_token_id, length).encode(turns, images)
        number = len(answer_runs(found.answer_mask)) - 1
        assert_same(found, parts[number])
        assert len(found.token_ids) <= length
        # What a student makes of the images that it finds to be left.
        _, num_images = part_with_images(turns, len(images), found.answer_mask, found.num_cut_answer_tokens)
        pixels = pixels_of(family, processor, images[:num_images])
        assert all(
            torch.equal(pixels[name], found.pixel_inputs[name]) for name in family.pixel_inputs if name in pixels
        )
        seen.add(num_images)
    # LLaVA-OneVision cuts an image that stands alone into tiles, so that it takes more tokens than two together.
    assert seen == ({2, 3} if model_type == "llava_onevision" else {1, 2, 3})


def test_fewer_images_may_take_more_tokens_and_then_more_turns_are_left_out(tmp_path: Path) -> None:
    """One image alone is cut into tiles here, several are not."""
    processor = load_processor(make_tiny_family(tmp_path / "teacher", "llava_onevision"))
    texts = ["Hello?", "Yes.", "<image>\nWhat?", "A red square.", "<image>", "Blue."]
    turns = [{"from": ("human", "gpt")[turn % 2], "value": text} for turn, text in enumerate(texts)]
    images = [image.resize((64, 64)) for image in images_of(turns)]
    image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    unlimited = ConversationEncoder(processor, image_token_id, NO_LIMIT)
    both, alone = unlimited.encode(turns, images), unlimited.encode(turns[:4], images[:1])
    second = answer_runs(both.answer_mask)[1][1]
    assert second < len(alone.token_ids) < len(both.token_ids) + 200
    found = ConversationEncoder(processor, image_token_id, second).encode(turns, images)
    assert (found.num_images, found.num_cut_images, found.pixel_inputs) == (0, 2, {})
    assert found.token_ids.tolist() == unlimited.encode(turns[:2], []).token_ids.tolist()[: len(found.token_ids)]
    assert found.num_cut_answer_tokens == int(both.answer_mask.sum() - found.answer_mask.sum())


def test_an_image_of_a_question_without_an_answer_is_not_left_out_in_silence(processor: Any) -> None:
    turns = CONVERSATIONS["an image a turn"][:3]
    whole = ConversationEncoder(processor, processor.image_token_id, NO_LIMIT).encode(turns, images_of(turns))
    short = ConversationEncoder(processor, processor.image_token_id, int(whole.image_positions[-1]))
    with pytest.raises(UnusableSample, match="because not every turn has an answer") as caught:
        short.encode(turns, images_of(turns))
    assert caught.value.reason == "image_beyond_max_length"
