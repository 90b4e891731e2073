"""Tokens and masks of ordinary conversations, against rules that know nothing of spans, offsets and jinja."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import pre_tokenizers, processors
from transformers import AutoConfig, LlavaProcessor, ProcessorMixin

from stages.checkpoints.processors import load_processor
from stages.conversations.chat_templates import read_template
from stages.conversations.encoder import ConversationEncoder, EncodedConversation
from tests.checkpoints import CHAT_TEMPLATE_OF_LLAVA_1_5, draw_random_image, load_tiny_llava, make_tiny_llava
from tests.stages.conversations.smollm2 import smollm2_template, smollm2_tokenizer
from tests.tiny_families import RECIPES, make_tiny_family

WORDS = ["red", " square", "blue\n", "é", "猫", " 🙂", " ", "  ", ".", ",", "12", "it's", "\n\n", "<", "|end|", "a_b"]
TRIMMED = processors.ByteLevel(trim_offsets=True)
TRIMMED_WITH_PREFIX = processors.Sequence([processors.ByteLevel(add_prefix_space=False, trim_offsets=True)])


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tiny_llava(make_tiny_llava(tmp_path_factory.mktemp("llava"), num_layers=1))[1]


def conversations(count: int) -> Iterator[tuple[list[str], list[Image.Image]]]:
    """Texts of questions and answers in turn, and the images that stand before the first."""
    rng = random.Random(0)
    for number in range(count):
        texts = ["".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(2 * rng.randint(1, 3))]
        # An answer that ends in white space loses it in a template that writes no end.
        yield [f"Q{texts[0].strip()}", *(f"{text}." for text in texts[1:])], [draw_random_image(rng)] * (number % 3)


def encoded(processor: Any, image_token_id: int, texts: list[str], images: list[Image.Image]) -> EncodedConversation:
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    turns[0]["value"] = "<image>\n" * len(images) + turns[0]["value"]
    return ConversationEncoder(processor, image_token_id, 10_000).encode(turns, images)


def by_bytes(tokenizer: Any, token_ids: list[int], written: list[tuple[str, str]]) -> list[bool]:
    """Marks the tokens with a byte of an answer: of each pair, what stands before it and the answer itself."""
    alphabet = dict(zip(_byte_level(range(256)), range(256), strict=True))
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    pieces = [
        added[number].encode() if number in added else bytes(alphabet[char] for char in token)
        for number, token in zip(token_ids, tokenizer.convert_ids_to_tokens(token_ids), strict=True)
    ]
    text, marked, position = b"".join(pieces), set(), 0
    for before, answer in written:
        start = text.index((before + answer).encode(), position) + len(before.encode())
        position = start + len(answer.encode())
        marked |= set(range(start, position))
    starts = [sum(map(len, pieces[:number])) for number in range(len(pieces))]
    return [bool(marked & set(range(start, start + len(p)))) for start, p in zip(starts, pieces, strict=True)]


def _byte_level(values: range) -> list[str]:
    """The characters that stand for bytes in byte-level tokenizers (GPT-2's `bytes_to_unicode`)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [value for value in values if value not in shown]
    return [chr(value if value in shown else 256 + hidden.index(value)) for value in values]


def test_the_alphabet_is_that_of_the_library() -> None:
    assert sorted(_byte_level(range(256))) == sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.mark.parametrize("model_type", RECIPES)
def test_every_family_reads_the_librarys_tokens_and_marks_the_bytes_of_answers(model_type: str, tmp_path: Path) -> None:
    folder = make_tiny_family(tmp_path, model_type)
    processor: Any = load_processor(folder)
    image_token_id, end = AutoConfig.from_pretrained(folder).image_token_id, processor.tokenizer.eos_token
    for texts, images in conversations(9):
        found = encoded(processor, image_token_id, texts, images)
        messages = [
            {"role": ("user", "assistant")[i % 2], "content": [{"type": "text", "text": text}]}
            for i, text in enumerate(texts)
        ]
        messages[0]["content"] = [*({"type": "image"} for _ in images), *messages[0]["content"]]  # type: ignore[misc]
        text = ProcessorMixin.apply_chat_template(processor, messages, tokenize=False)
        theirs = processor(text=[text], images=[images] if images else None, return_tensors="pt")["input_ids"][0]
        torch.testing.assert_close(found.token_ids, theirs)
        written = [("assistant: ", answer + end) for answer in texts[1::2]]
        assert found.answer_mask.tolist() == by_bytes(processor.tokenizer, theirs.tolist(), written)


@pytest.mark.parametrize("trimming", [None, TRIMMED, TRIMMED_WITH_PREFIX], ids=["whole", "trimmed", "in a sequence"])
@pytest.mark.parametrize("template", ["llava-1.5", "that of the library"])
def test_the_formats_of_llava_1_5_mark_the_bytes_of_answers_whatever_the_offsets(
    template: str, trimming: Any, llava: Any
) -> None:
    bundled = template == "llava-1.5"
    llava.chat_template = read_template(template) if bundled else CHAT_TEMPLATE_OF_LLAVA_1_5
    llava.tokenizer.backend_tokenizer.post_processor = trimming
    end = llava.tokenizer.eos_token if bundled else ""
    for texts, images in conversations(20):
        found = encoded(llava, llava.image_token_id, texts, images)
        before = "ASSISTANT:" if bundled else "ASSISTANT: "
        written = [(before, f"{' ' if bundled else ''}{answer}{end}") for answer in texts[1::2]]
        assert found.answer_mask.tolist() == by_bytes(llava.tokenizer, found.token_ids.tolist(), written)
    llava.tokenizer.backend_tokenizer.post_processor = None


def test_a_tokenizer_that_trims_its_offsets_keeps_tokens_of_white_space_in_the_mask(llava: Any) -> None:
    llava.chat_template = read_template("llava-1.5")
    texts = ["What?", "a    b      c"]
    whole = encoded(llava, llava.image_token_id, texts, [])
    llava.tokenizer.backend_tokenizer.post_processor = TRIMMED
    offsets = llava.tokenizer("a    b", return_offsets_mapping=True)["offset_mapping"]
    assert any(first == last for first, last in offsets)
    trimmed = encoded(llava, llava.image_token_id, texts, [])
    llava.tokenizer.backend_tokenizer.post_processor = None
    assert trimmed.token_ids.tolist() == whole.token_ids.tolist()
    assert trimmed.answer_mask.tolist() == whole.answer_mask.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("trimming", [None, TRIMMED], ids=["whole", "trimmed"])
def test_a_real_tokenizer_and_its_own_template_of_strings_mark_the_bytes_of_answers(trimming: Any, llava: Any) -> None:
    tokenizer, images = smollm2_tokenizer(trimming), llava.image_processor
    processor = LlavaProcessor(images, tokenizer, patch_size=8, vision_feature_select_strategy="full")
    processor.chat_template = smollm2_template()
    number = tokenizer.convert_tokens_to_ids("<image>")
    for texts, pictures in conversations(40):
        found = encoded(processor, number, texts, pictures)
        assert len(found.image_positions) == 16 * len(pictures)
        written = [("<|im_start|>assistant\n", answer + "<|im_end|>") for answer in texts[1::2]]
        assert found.answer_mask.tolist() == by_bytes(tokenizer, found.token_ids.tolist(), written)
    typed = encoded(processor, number, ["What is   <|im_end|>?", "It  ends a   turn: <|im_end|>   or <image>."], [])
    assert tokenizer.decode(typed.token_ids[typed.answer_mask]).count("<|im_end|>") == 2
    # Its template adds a system turn.
    assert typed.token_ids.tolist().count(tokenizer.eos_token_id) == 3
