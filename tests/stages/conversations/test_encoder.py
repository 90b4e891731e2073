import pickle
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import processors

from stages.checkpoints.processors import image_processor_backend
from stages.conversations.chat_templates import chat_template
from stages.conversations.encoder import ConversationEncoder
from stages.unusable_sample import UnusableSample
from storage.errors import UserError
from tests.checkpoints import (
    CHAT_TEMPLATE_OF_LLAVA_1_5,
    CHAT_TEMPLATE_WITHOUT_GENERATION,
    draw_random_image,
    load_tiny_llava,
    make_tiny_llava,
)

NUM_IMAGE_TOKENS = 16
Turns = list[dict[str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def processor(folder: Path) -> Any:
    return load_tiny_llava(folder)[1]


@pytest.fixture
def encoder(processor: Any) -> ConversationEncoder:
    return ConversationEncoder(processor, processor.image_token_id, 512)


@pytest.fixture
def prefix_encoder(processor: Any) -> ConversationEncoder:
    processor.chat_template = CHAT_TEMPLATE_WITHOUT_GENERATION
    return ConversationEncoder(processor, processor.image_token_id, 512)


def images(count: int) -> list[Image.Image]:
    rng = random.Random(count)
    return [draw_random_image(rng) for _ in range(count)]


def turns(*values: str, system: str | None = None) -> Turns:
    dialogue = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return ([{"from": "system", "value": system}] if system else []) + dialogue


CONVERSATIONS = {
    "one turn": (turns("<image>\nWhat color?", "Red."), 1),
    "placeholder at the end": (turns("What color?\n<image>", "Red."), 1),
    "several turns": (turns("<image>\nWhat?", "A red square.", "Where?", "Left.", "Why?", "So."), 1),
    "text only": (turns("What is a square?", "A shape."), 0),
    "system turn": (turns("<image>\nWhat?", "Red.", system="You are helpful."), 1),
    "several images": (turns("<image>\nand <image> differ?", "Yes.", "And <image>\n?", "No."), 3),
    "letters of several bytes": (turns("<image>\nÜñí 猫?", "猫 é 🙂 ok.", "🙂?", "é"), 1),
    "empty answer": (turns("<image>\nWhat?", ""), 1),
    "white space at the answer's end": (turns("<image>\nWhat?", "Red. \n", "What?", "  Blue"), 1),
    "no answer to the last turn": (turns("<image>\nWhat?", "Red.", "Sure?"), 1),
}


def answers(processor: Any, token_ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
    spans: list[list[int]] = []
    for position, (token, marked) in enumerate(zip(token_ids.tolist(), mask.tolist(), strict=True)):
        if marked and (position == 0 or not mask[position - 1]):
            spans.append([])
        if marked:
            spans[-1].append(token)
    return [processor.tokenizer.decode(span) for span in spans]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_both_ways_of_finding_answers_give_the_same_mask(
    name: str, encoder: ConversationEncoder, processor: Any
) -> None:
    conversation, num_images = CONVERSATIONS[name]
    by_blocks = encoder.encode(conversation, images(num_images))
    processor.chat_template = CHAT_TEMPLATE_WITHOUT_GENERATION
    by_prefixes = ConversationEncoder(processor, processor.image_token_id, 512).encode(conversation, images(num_images))
    torch.testing.assert_close(by_blocks.token_ids, by_prefixes.token_ids)
    torch.testing.assert_close(by_blocks.answer_mask, by_prefixes.answer_mask)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_tokens_mask_and_pixels_are_those_of_the_processors_chat_template(
    name: str, encoder: ConversationEncoder, processor: Any
) -> None:
    conversation, num_images = CONVERSATIONS[name]
    encoded = encoder.encode(conversation, images(num_images))
    pending = iter(images(num_images))
    messages = []
    for turn in conversation:
        role = {"human": "user", "gpt": "assistant", "system": "system"}[turn["from"]]
        content: list[dict[str, Any]] = []
        if num_images == 1 and "<image>" in turn["value"]:
            content = [
                {"type": "image", "image": next(pending)},
                {"type": "text", "text": turn["value"].replace("<image>", "").strip()},
            ]
        else:
            for number, piece in enumerate(turn["value"].replace("<image>\n", "<image>").split("<image>")):
                content += [{"type": "image", "image": next(pending)}] if number else []
                content += [{"type": "text", "text": piece}]
        messages.append({"role": role, "content": content})
    expected = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    torch.testing.assert_close(encoded.token_ids, expected["input_ids"][0])
    torch.testing.assert_close(encoded.answer_mask, expected["assistant_masks"][0].bool())
    assert list(encoded.pixel_inputs) == (["pixel_values"] if num_images else [])
    if num_images:
        torch.testing.assert_close(encoded.pixel_inputs["pixel_values"], expected["pixel_values"])


def test_answers_include_their_end_token_and_nothing_else(encoder: ConversationEncoder, processor: Any) -> None:
    encoded = encoder.encode(*_with_images("several turns"))
    assert answers(processor, encoded.token_ids, encoded.answer_mask) == [
        " A red square.<|endoftext|>",
        " Left.<|endoftext|>",
        " So.<|endoftext|>",
    ]
    assert encoded.token_ids.dtype == torch.int64
    assert encoded.answer_mask.dtype == torch.bool


def test_white_space_between_turns_is_not_part_of_an_answer(processor: Any) -> None:
    template = CHAT_TEMPLATE_WITHOUT_GENERATION.replace("+ eos_token -}}", "+ eos_token + '\\n' -}}")
    assert template != CHAT_TEMPLATE_WITHOUT_GENERATION
    processor.chat_template = template
    encoder = ConversationEncoder(processor, processor.image_token_id, 512)
    encoded = encoder.encode(*_with_images("several turns"))
    found = answers(processor, encoded.token_ids, encoded.answer_mask)
    assert found == [" A red square.<|endoftext|>", " Left.<|endoftext|>", " So.<|endoftext|>"]


def test_white_space_that_ends_a_generation_block_does_not_pull_the_next_turn_into_the_answer(processor: Any) -> None:
    processor.chat_template = CHAT_TEMPLATE_OF_LLAVA_1_5
    # In tokenizers of the Llama family, the space before a word is a part of it.
    processor.tokenizer.add_tokens([" USER"])
    encoder = ConversationEncoder(processor, processor.image_token_id, 512)
    encoded = encoder.encode(*_with_images("several turns"))
    found = answers(processor, encoded.token_ids, encoded.answer_mask)
    assert [answer.strip() for answer in found] == ["A red square.", "Left.", "So."]


def test_a_single_image_comes_first_wherever_the_turn_places_it(encoder: ConversationEncoder) -> None:
    first = encoder.encode(turns("<image>\nWhat color?", "Red."), images(1))
    last = encoder.encode(turns("What color?\n<image>", "Red."), images(1))
    middle = encoder.encode(turns("<image>What color?", "Red."), images(1))
    torch.testing.assert_close(first.token_ids, last.token_ids)
    torch.testing.assert_close(first.token_ids, middle.token_ids)


def test_conversations_on_one_image_share_the_tokens_up_to_its_end(encoder: ConversationEncoder) -> None:
    one = encoder.encode(turns("<image>\nWhat color?", "Red."), images(1))
    other = encoder.encode(turns("Where is it? <image>", "Left.", "Why?", "So."), images(1))
    end = int(one.image_positions[-1]) + 1
    torch.testing.assert_close(one.token_ids[:end], other.token_ids[:end])


def test_image_positions_hold_the_image_token(encoder: ConversationEncoder) -> None:
    for name, (conversation, num_images) in CONVERSATIONS.items():
        encoded = encoder.encode(conversation, images(num_images))
        assert len(encoded.image_positions) == num_images * NUM_IMAGE_TOKENS, name
        expected = (encoded.token_ids == encoder.image_token_id).nonzero()[:, 0]
        torch.testing.assert_close(encoded.image_positions, expected)
        assert not encoded.answer_mask[encoded.image_positions].any()


def test_a_cut_inside_an_answer_keeps_its_tokens_before_the_cut(encoder: ConversationEncoder, processor: Any) -> None:
    whole = encoder.encode(*_with_images("several turns"))
    last = int(whole.answer_mask.nonzero()[-1])
    for length in range(last - 3, last + 1):
        cut = ConversationEncoder(processor, processor.image_token_id, length, cut="tokens")
        encoded = cut.encode(*_with_images("several turns"))
        torch.testing.assert_close(encoded.token_ids, whole.token_ids[:length])
        torch.testing.assert_close(encoded.answer_mask, whole.answer_mask[:length])
        assert encoded.num_cut_tokens == len(whole.token_ids) - length
        assert encoded.num_cut_answer_tokens == last + 1 - length


@pytest.mark.parametrize("prefixes", [False, True])
@pytest.mark.parametrize("name", ["several turns", "text only", "letters of several bytes", "one turn"])
def test_by_default_a_long_conversation_ends_with_the_last_answer_that_fits_whole(
    name: str, prefixes: bool, processor: Any
) -> None:
    if prefixes:
        processor.chat_template = CHAT_TEMPLATE_WITHOUT_GENERATION
    conversation, pictures = _with_images(name)
    whole = ConversationEncoder(processor, processor.image_token_id, 512).encode(conversation, pictures)
    all_answers = answers(processor, whole.token_ids, whole.answer_mask)
    for length in range(int(whole.answer_mask.nonzero()[0]), len(whole.token_ids) + 1):
        fitting = answers(processor, whole.token_ids[:length], whole.answer_mask[:length])
        num_whole = sum(found == wanted for found, wanted in zip(fitting, all_answers, strict=False))
        cut = ConversationEncoder(processor, processor.image_token_id, length)
        if not num_whole:
            assert _reason(cut, conversation, pictures) == "too_long"
            continue
        read = cut.encode(conversation, pictures)
        size = len(read.token_ids)
        assert size == length == len(whole.token_ids) or bool(read.answer_mask[-1])
        assert torch.equal(read.token_ids, whole.token_ids[:size])
        assert answers(processor, read.token_ids, read.answer_mask) == all_answers[:num_whole]
        assert read.num_cut_tokens == len(whole.token_ids) - size
        assert read.num_cut_answer_tokens == int(whole.answer_mask.sum() - read.answer_mask.sum())


@pytest.mark.parametrize(
    ("max_length", "reason"),
    [
        (lambda image_end, answer: image_end - 1, "image_beyond_max_length"),
        (lambda image_end, answer: image_end, "no_answer_within_max_length"),
        (lambda image_end, answer: answer, "no_answer_within_max_length"),
        (lambda image_end, answer: answer + 1, None),
    ],
)
def test_a_cut_may_not_take_image_tokens_or_every_answer_token(
    max_length: Callable[[int, int], int],
    reason: str | None,
    encoder: ConversationEncoder,
    processor: Any,
) -> None:
    whole = encoder.encode(*_with_images("one turn"))
    length = max_length(int(whole.image_positions[-1]) + 1, int(whole.answer_mask.nonzero()[0]))
    cut = ConversationEncoder(processor, processor.image_token_id, length, cut="tokens")
    if reason is None:
        assert int(cut.encode(*_with_images("one turn")).answer_mask.sum()) == 1
    else:
        assert _reason(cut, *_with_images("one turn")) == reason


UNUSABLE = {
    "no placeholder": (turns("What?", "Red."), 1, "image_without_placeholder"),
    "too many placeholders": (turns("<image>\n<image>\nWhat?", "Red."), 1, "placeholder_without_image"),
    "answer first": ([{"from": "gpt", "value": "Red."}], 0, "wrong_turn_order"),
    "two questions": (
        [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}],
        0,
        "wrong_turn_order",
    ),
    "system turn later": (
        [*turns("a", "b"), {"from": "system", "value": "c"}],
        0,
        "wrong_turn_order",
    ),
    "unknown speaker": ([{"from": "tool", "value": "a"}], 0, "unknown_role"),
    "value is not text": ([{"from": "human", "value": 3}], 0, "bad_turn"),
    "no turns": ([], 0, "empty_conversation"),
    "question only": (turns("a"), 0, "answer_missing"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_conversations_name_their_reason(
    name: str, encoder: ConversationEncoder, prefix_encoder: ConversationEncoder
) -> None:
    conversation, num_images, reason = UNUSABLE[name]
    for either in (encoder, prefix_encoder):
        assert _reason(either, conversation, images(num_images)) == reason


def test_an_image_the_processor_refuses_is_named(encoder: ConversationEncoder) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise ValueError("mean must have 1 elements")

    encoder.processor.image_processor.preprocess = refuse
    assert _reason(encoder, *_with_images("one turn")) == "refused_by_processor"


def test_a_template_that_rewrites_earlier_turns_is_refused(processor: Any) -> None:
    processor.chat_template = CHAT_TEMPLATE_WITHOUT_GENERATION.replace(
        "'USER: '", "('USER: ' if loop.last else 'BEFORE: ')"
    )
    encoder = ConversationEncoder(processor, processor.image_token_id, 512)
    assert _reason(encoder, *_with_images("several turns")) == "template_not_prefix_stable"


def test_a_template_that_raises_is_named(processor: Any) -> None:
    processor.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + CHAT_TEMPLATE_WITHOUT_GENERATION
    )
    encoder = ConversationEncoder(processor, processor.image_token_id, 512)
    with pytest.raises(UnusableSample, match="no system") as caught:
        encoder.encode(*_with_images("system turn"))
    assert caught.value.reason == "refused_by_template"


@pytest.mark.parametrize(
    "template",
    [
        "nothing of the conversation",
        "{{ messages[0]['content'] }}",
        "{{ messages['first'] + 1 }}",
    ],
)
def test_a_template_that_renders_no_conversation_is_refused_at_once(template: str, processor: Any) -> None:
    processor.chat_template = template
    with pytest.raises(UserError, match="cannot render a question and its answer: "):
        ConversationEncoder(processor, processor.image_token_id, 512)


def test_a_processor_without_a_template_is_refused(processor: Any) -> None:
    processor.chat_template = {"other": "x"}
    with pytest.raises(UserError, match="no \\(default\\) chat template"):
        chat_template(processor)


def test_a_prompt_is_the_pairs_tokens_before_its_answer(encoder: ConversationEncoder) -> None:
    prompt = encoder.encode_prompt("What color?", images(1))
    pair = encoder.encode_pair("What color?", "Red.", images(1))
    first_answer = int(pair.answer_mask.nonzero()[0])
    torch.testing.assert_close(prompt.token_ids, pair.token_ids[:first_answer])
    assert not prompt.answer_mask.any()
    torch.testing.assert_close(prompt.image_positions, pair.image_positions)


def test_a_prompt_is_never_cut(processor: Any) -> None:
    encoder = ConversationEncoder(processor, processor.image_token_id, 20)
    with pytest.raises(UnusableSample) as caught:
        encoder.encode_prompt("What color?", images(1))
    assert caught.value.reason == "prompt_beyond_max_length"


def test_a_beginning_token_written_by_the_template_is_not_added_again(processor: Any) -> None:
    plain = ConversationEncoder(processor, processor.image_token_id, 512).encode(*_with_images("one turn"))
    processor.tokenizer.bos_token = "<|pad|>"
    processor.chat_template = "{{- bos_token -}}" + str(processor.chat_template)
    begun = ConversationEncoder(processor, processor.image_token_id, 512).encode(*_with_images("one turn"))
    bos = processor.tokenizer.convert_tokens_to_ids("<|pad|>")
    assert begun.token_ids.tolist() == [bos, *plain.token_ids.tolist()]
    assert begun.answer_mask.tolist() == [False, *plain.answer_mask.tolist()]


@pytest.mark.parametrize("text", ["What?", "What is <|pad|>?"])
def test_a_beginning_token_behind_white_space_is_not_added_again(text: str, processor: Any) -> None:
    tokenizer = processor.tokenizer
    tokenizer.bos_token, bos = "<|pad|>", tokenizer.pad_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", bos)]
    )
    processor.chat_template = "{{- '\\n ' + bos_token -}}" + str(processor.chat_template)
    encoded = ConversationEncoder(processor, processor.image_token_id, 512).encode(turns(text, "Red."), [])
    assert encoded.token_ids.tolist().count(bos) == 1
    assert tokenizer.decode(encoded.token_ids).startswith("\n <|pad|>USER: What")


@pytest.mark.parametrize("text", ["What?", "What is <|pad|>?"], ids=["plain", "with a special token in it"])
@pytest.mark.parametrize("written", [True, False], ids=["by both", "by the tokenizer"])
def test_there_is_one_beginning_token_whoever_writes_it(written: bool, text: str, processor: Any) -> None:
    tokenizer = processor.tokenizer
    tokenizer.bos_token, bos = "<|pad|>", tokenizer.pad_token_id
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<|pad|> $A", special_tokens=[("<|pad|>", bos)]),
        ]
    )
    if written:
        processor.chat_template = "{{- bos_token -}}" + str(processor.chat_template)
    encoder = ConversationEncoder(processor, processor.image_token_id, 512)
    for encoded in (encoder.encode(turns(text, "Red  one."), []), encoder.encode_prompt(text, [])):
        assert encoded.token_ids.tolist()[0] == bos
        assert encoded.token_ids.tolist().count(bos) == 1
    found = encoder.encode(turns(text, "Red  one."), [])
    assert tokenizer.decode(found.token_ids[found.answer_mask]) == " Red  one.<|endoftext|>"


def test_threads_may_share_an_encoder(encoder: ConversationEncoder) -> None:
    conversation, pictures = _with_images("several turns")
    expected = encoder.encode(conversation, pictures).answer_mask

    def encode(number: int) -> torch.Tensor:
        if number % 2:
            encoder.encode_prompt("What color?", pictures)
        return encoder.encode(conversation, pictures).answer_mask

    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(encode, range(64)):
            torch.testing.assert_close(found, expected)


def test_the_backend_is_the_class_that_made_the_pixels(processor: Any) -> None:
    assert image_processor_backend(processor) == "SiglipImageProcessorPil"


def test_an_unusable_conversation_survives_pickling_between_processes() -> None:
    error = pickle.loads(pickle.dumps(UnusableSample("answer_missing", "why")))
    assert (error.reason, error.detail, str(error)) == ("answer_missing", "why", "answer_missing: why")


def _with_images(name: str) -> tuple[Turns, list[Image.Image]]:
    conversation, num_images = CONVERSATIONS[name]
    return conversation, images(num_images)


def _reason(encoder: ConversationEncoder, conversation: Turns, pictures: Sequence[Image.Image]) -> str:
    with pytest.raises(UnusableSample) as caught:
        encoder.encode(conversation, pictures)
    assert caught.value.detail
    return caught.value.reason
