"""Special tokens in the text of a turn are read as the text they are, by whoever reads it."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, normalizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from stages.conversations.encoder import ConversationEncoder, EncodedConversation
from stages.unusable_sample import UnusableSample
from tests.checkpoints import (
    CHAT_TEMPLATE,
    CHAT_TEMPLATE_OF_LLAVA_1_5,
    CHAT_TEMPLATE_WITHOUT_GENERATION,
    CHATML,
    draw_random_image,
    load_tiny_llava,
    make_tiny_llava,
)

END, PAD, IMAGE = "<|endoftext|>", "<|pad|>", "<image>"
TEMPLATES = {"marked": CHAT_TEMPLATE, "by prefixes": CHAT_TEMPLATE_WITHOUT_GENERATION}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("llava"), num_layers=1)


@pytest.fixture
def processor(folder: Path) -> Any:
    return load_tiny_llava(folder)[1]


def encoder_of(processor: Any) -> ConversationEncoder:
    return ConversationEncoder(processor, processor.image_token_id, 5000)


def turns(*values: str, system: str | None = None) -> list[dict[str, str]]:
    dialogue = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return ([{"from": "system", "value": system}] if system else []) + dialogue


def pictures(count: int) -> list[Image.Image]:
    return [draw_random_image(random.Random(number)) for number in range(count)]


def plain(processor: Any) -> Callable[[str], list[int]]:
    """Tokens of a text in the same tokenizer without its special tokens."""
    rules = processor.tokenizer.backend_tokenizer
    rules = Tokenizer.from_str(rules.to_str())
    rules.encode_special_tokens = True
    return lambda text: rules.encode(text, add_special_tokens=False).ids


def expected(processor: Any, *pieces: str | int) -> list[int]:
    """Ids of texts, tokens as their ids, between which the tokenizer cuts in any case."""
    encode = plain(processor)
    return [number for piece in pieces for number in ([piece] if isinstance(piece, int) else encode(piece))]


def marked(encoded: EncodedConversation) -> list[int]:
    ids: list[int] = encoded.token_ids[encoded.answer_mask].tolist()
    return ids


@pytest.mark.parametrize("template", TEMPLATES)
def test_each_is_the_tokens_of_its_characters_and_the_templates_own_stay(template: str, processor: Any) -> None:
    processor.chat_template = TEMPLATES[template]
    end, image = processor.tokenizer.eos_token_id, processor.image_token_id
    conversation = turns(
        f"<image>\nWhat is {END}?",
        f"A {PAD} or{IMAGE}; é{END}x.",
        f"Say <image>.{END}",
        f"{IMAGE}{IMAGE}",
        system=f"No {IMAGE} here{PAD}",
    )
    encoded = encoder_of(processor).encode(conversation, pictures(2))
    answers = [f" A {PAD} or{IMAGE}; é{END}x.", f" {IMAGE}{IMAGE}"]
    assert encoded.token_ids.tolist() == expected(
        processor,
        f"No {IMAGE} here{PAD} USER: ",
        *[image] * 16,
        f"\nWhat is {END}? ASSISTANT:" + answers[0],
        end,
        "USER: Say ",
        *[image] * 16,
        f"\n.{END} ASSISTANT:" + answers[1],
        end,
    )
    assert len(encoded.image_positions) == 32
    assert marked(encoded) == [*plain(processor)(answers[0]), end, *plain(processor)(answers[1]), end]


def test_a_tokenizer_that_begins_each_piece_with_a_space_reads_the_same_pieces(processor: Any) -> None:
    # As those of the Llama family do.
    rules = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    processor.tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(rules)
    end, image = processor.tokenizer.eos_token_id, processor.image_token_id
    encoded = encoder_of(processor).encode(turns(f"<image>\nWhat is {END}?", f"A {PAD}."), pictures(1))
    text = f"\nWhat is {END}? ASSISTANT: A {PAD}."
    assert encoded.token_ids.tolist() == expected(processor, "USER: ", *[image] * 16, text, end)
    assert processor.tokenizer.decode(marked(encoded)).replace("\u2581", " ") == f" A {PAD}.{END}"


def test_a_placeholder_that_is_made_by_taking_one_out_is_text(processor: Any) -> None:
    encoded = encoder_of(processor).encode(turns("<ima<image>ge>\nWhat?", "Red."), pictures(1))
    assert len(encoded.image_positions) == 16
    assert f"\n{IMAGE}\nWhat?" in processor.tokenizer.decode(encoded.token_ids)


def test_a_prompt_and_a_pair_read_them_alike(processor: Any) -> None:
    encoder = encoder_of(processor)
    earlier = turns(f"<image>\nWhat is {END}?", f"It is {PAD}.")
    prompt = encoder.encode_prompt(f"And {PAD}?", pictures(1), earlier).token_ids.tolist()
    whole = encoder.encode([*earlier, *turns(f"And {PAD}?", "So.")], pictures(1)).token_ids.tolist()
    assert prompt == whole[: len(prompt)]
    pair = encoder.encode_pair(f"Is {END} there?", f"{PAD} is.", pictures(1))
    asked = encoder.encode_prompt(f"Is {END} there?", pictures(1))
    assert asked.token_ids.tolist() == pair.token_ids.tolist()[: len(asked.token_ids)]
    assert processor.tokenizer.decode(marked(pair)) == f" {PAD} is.{END}"
    assert marked(pair).count(processor.tokenizer.pad_token_id) == 0


def test_an_end_that_an_answer_brings_along_is_not_said_twice(processor: Any) -> None:
    encoder = encoder_of(processor)
    without = encoder.encode(turns("<image>\nWhat?", "Red.", "Why?", "So."), pictures(1))
    brought = encoder.encode(turns("<image>\nWhat?", f"Red.{END}", "Why?", f"So.{END}\n{END} "), pictures(1))
    torch.testing.assert_close(brought.token_ids, without.token_ids)
    torch.testing.assert_close(brought.answer_mask, without.answer_mask)


def test_the_end_that_the_template_writes_is_known_beside_that_of_the_tokenizer(processor: Any) -> None:
    tokens = [AddedToken(name, special=False, normalized=False) for name in ("<|im_start|>", "<|im_end|>")]
    processor.tokenizer.add_tokens(tokens)
    processor.chat_template = CHATML
    encoder = encoder_of(processor)
    without = encoder.encode(turns("<image>\nWhat?", "Red."), pictures(1))
    for brought in ("Red.<|im_end|>", f"Red.{END}", f"Red.<|im_end|>\n{END}"):
        found = encoder.encode(turns("<image>\nWhat?", brought), pictures(1))
        torch.testing.assert_close(found.token_ids, without.token_ids)
    # Control tokens need not be called special; the template writes them.
    inside = encoder.encode(turns("<image>\nWhat is <|im_end|>?", "A <|im_end|> b."), pictures(1))
    written = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert inside.token_ids.tolist().count(written) == 2
    assert processor.tokenizer.decode(marked(inside)) == "A <|im_end|> b.<|im_end|>"


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CHAT_TEMPLATE_OF_LLAVA_1_5])
def test_an_answer_that_is_only_an_end_is_none(template: str, processor: Any) -> None:
    processor.chat_template = template
    encoder = encoder_of(processor)
    for answer in (END, f" {END}\n{END} "):
        with pytest.raises(UnusableSample, match=r"answer_missing: turn 3 \(gpt\) is nothing but an end token"):
            encoder.encode(turns("<image>\nWhat?", "Red.", "Why?", answer), pictures(1))
    # Of a question it is the text, and earlier answers of a prompt are as the model gave them.
    assert encoder.encode(turns(f"<image>\n{END}", "Red."), pictures(1)).answer_mask.any()
    encoder.encode_prompt("And?", [], turns("What?", END))


def test_an_end_is_kept_where_the_template_writes_none(processor: Any) -> None:
    processor.chat_template = CHAT_TEMPLATE_OF_LLAVA_1_5
    encoded = encoder_of(processor).encode(turns("<image>\nWhat?", f"A {PAD}.{END}", "Why?", "So."), pictures(1))
    assert encoded.token_ids.tolist().count(processor.tokenizer.eos_token_id) == 1
    assert encoded.token_ids.tolist().count(processor.tokenizer.pad_token_id) == 0
    assert processor.tokenizer.decode(marked(encoded)).split() == ["A", f"{PAD}.{END}So."]


def test_added_tokens_that_are_words_or_white_space_stay_tokens(processor: Any) -> None:
    processor.tokenizer.add_tokens([" red", "\n\n", "   "])
    encoded = encoder_of(processor).encode(turns(f"What   is {PAD}?\n\nWhat?", "It is red."), [])
    added = processor.tokenizer.convert_tokens_to_ids([" red", "\n\n", "   "])
    assert [encoded.token_ids.tolist().count(number) for number in added] == [1, 1, 1]


def test_a_tokenizer_that_cannot_tell_them_from_text_puts_the_sample_into_the_ledger(processor: Any) -> None:
    letters = sorted(set("USER: ASSISTANT:What is there?Red<>/s\n"))
    vocab = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -5.0) for letter in letters)]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram(vocab, unk_id=0)),
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": IMAGE},
    )
    images = processor.image_processor
    own = LlavaProcessor(images, tokenizer, patch_size=8, vision_feature_select_strategy="full")
    own.chat_template = CHAT_TEMPLATE
    encoder = encoder_of(own)
    assert encoder.encode(turns("<image>\nWhat?", "Red"), pictures(1)).answer_mask.any()
    with pytest.raises(UnusableSample, match=r"special_token_in_text: .* cannot tell </s> from the same characters"):
        encoder.encode(turns("<image>\nWhat is </s>?", "Red"), pictures(1))


def test_characters_that_break_them_are_refused_beside_one_and_text_elsewhere(processor: Any) -> None:
    encoder = encoder_of(processor)
    for char in ("\ufdd0", "\ufdd1"):
        with pytest.raises(UnusableSample, match="special_token_in_text"):
            encoder.encode(turns("What?", f"{char}{PAD}"), [])
        # Another turn's would be lost as well.
        with pytest.raises(UnusableSample, match="special_token_in_text"):
            encoder.encode(turns("What?", f"a{char}", f"Is it {PAD}?", "So."), [])
        assert char in processor.tokenizer.decode(encoder.encode(turns("What?", f"a{char}"), []).token_ids)


def test_one_that_the_template_writes_for_a_system_turn_or_a_later_question_is_text(processor: Any) -> None:
    names = ["<|sys|>", "<|more|>", "<|ask|>"]
    processor.tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in names])
    processor.chat_template = (
        "{%- for m in messages -%}{%- if m['role'] == 'system' -%}{{- '<|' + m['role'][:3] + '|>' -}}"
        "{%- elif m['role'] == 'user' and not loop.first -%}{{- '<|more|>' -}}{%- endif -%}"
        "{{- m['content'] + ' ' -}}{%- endfor -%}{%- if add_generation_prompt -%}<|ask|>{%- endif -%}"
    )
    encoder = encoder_of(processor)
    numbers = processor.tokenizer.convert_tokens_to_ids(names)
    typed = "Is it <|sys|>, <|more|> or <|ask|>?"
    prompt = encoder.encode_prompt(typed, [], turns(typed, f"It is {PAD}.", system="Be brief."))
    assert [prompt.token_ids.tolist().count(number) for number in numbers] == [1, 2, 1]
    alone = encoder.encode_prompt(typed, []).token_ids.tolist()
    assert [alone.count(number) for number in numbers] == [0, 0, 1]


@pytest.mark.parametrize("typed", ["\uff1c|end|>", "<|END|>", "\uff1c|pad|>", "<|\uff30AD|>", "<|End|><|end|>"])
def test_what_a_normalizer_makes_a_special_token_of_is_text(typed: str, processor: Any) -> None:
    tokenizer = processor.tokenizer
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(n, special=True, normalized=True) for n in ("<|end|>", "<|pad|>")]}
    )
    numbers = tokenizer.convert_tokens_to_ids(["<|end|>", "<|pad|>"])
    assert set(numbers) & set(tokenizer(typed)["input_ids"])
    processor.chat_template = CHAT_TEMPLATE.replace("eos_token", "'<|end|>'")
    encoder = encoder_of(processor)
    encoded = encoder.encode(turns(f"What is {typed}?", f"A {typed}."), [])
    assert [encoded.token_ids.tolist().count(number) for number in numbers] == [1, 0]
    read = tokenizer.decode(marked(encoded))
    assert read == tokenizer.backend_tokenizer.normalizer.normalize_str(f" A {typed}.<|end|>")


def test_one_of_a_single_character_is_text(processor: Any) -> None:
    processor.tokenizer.add_special_tokens({"eos_token": "†", "additional_special_tokens": ["††", "‡"]})
    processor.chat_template = CHAT_TEMPLATE.replace("'USER: '", "'‡USER: '")
    numbers = processor.tokenizer.convert_tokens_to_ids(["†", "††", "‡"])
    encoded = encoder_of(processor).encode(turns("<image>\nWhat ‡ is †††?", "A ‡ b†c.†"), pictures(1))
    image = processor.image_token_id
    assert encoded.token_ids.tolist() == expected(
        processor,
        numbers[2],
        "USER: ",
        *[image] * 16,
        "\nWhat ‡ is †††? ASSISTANT: A ‡ b†c.",
        numbers[0],
    )
    assert processor.tokenizer.decode(marked(encoded)) == " A ‡ b†c.†"


def test_more_of_a_single_character_than_can_be_told_apart_put_the_sample_into_the_ledger(processor: Any) -> None:
    many = [chr(0x4E00 + number) for number in range(40)]
    processor.tokenizer.add_special_tokens({"additional_special_tokens": many})
    encoder = encoder_of(processor)
    assert encoder.encode(turns("What?", "Red."), []).answer_mask.any()
    with pytest.raises(UnusableSample, match=r"special_token_in_text: .* beyond the 30 of one character"):
        encoder.encode(turns("".join(many), "Red."), [])


def test_a_character_of_the_vocabulary_that_is_called_special_too_stays_as_it_is(processor: Any) -> None:
    before = encoder_of(processor).encode(turns("What! Is <|x|>?", "Red!"), [])
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["!"]})
    for typed in ("Red!", f"Red!{END}"):
        after = encoder_of(processor).encode(turns("What! Is <|x|>?", typed), [])
        assert after.token_ids.tolist() == before.token_ids.tolist()
