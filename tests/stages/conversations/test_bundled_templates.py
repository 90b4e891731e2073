"""The templates that come with the package, against texts written out by hand from the published formats.

ChatML: github.com/openai/openai-python, chatml.md; Qwen and SmolLM add a system turn of their own where there is none.
Llama 3: the model cards of Meta ("Meta Llama 3, special tokens"). Mistral 7B Instruct: its model card, and the first
version of `mistral_common`'s encoders; LLaVA-1.6 puts the picture first.
"""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers import AddedToken

from stages.conversations.chat_templates import read_template
from stages.conversations.encoder import ConversationEncoder
from stages.conversations.template_process import render
from tests.checkpoints import load_tiny_llava, make_tiny_llava
from tests.stages.conversations.smollm2 import smollm2_template

TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>"]
TOKENS += ["<|start_header_id|>", "<|end_header_id|>"]

FIRST = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A square."}]
MORE = [{"from": "human", "value": "Its color?"}, {"from": "gpt", "value": "Red."}]
SYSTEM = {"from": "system", "value": "Be brief."}

CHATML = """\
<|im_start|>user
<image>
What is it?<|im_end|>
<|im_start|>assistant
A square.<|im_end|>
<|im_start|>user
Its color?<|im_end|>
<|im_start|>assistant
Red.<|im_end|>
"""
CHATML_SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"
LLAMA_3 = """\
<|begin_of_text|><|start_header_id|>user<|end_header_id|>

<image>
What is it?<|eot_id|><|start_header_id|>assistant<|end_header_id|>

A square.<|eot_id|><|start_header_id|>user<|end_header_id|>

Its color?<|eot_id|><|start_header_id|>assistant<|end_header_id|>

Red.<|eot_id|>"""
LLAMA_3_SYSTEM = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
MISTRAL = "<s>[INST] <image>\nWhat is it? [/INST] A square.</s>[INST] Its color? [/INST] Red.</s>"  # one line

CASES = {
    "chatml": (CHATML, CHATML_SYSTEM + CHATML, ["A square.<|im_end|>", "Red.<|im_end|>"], None, "<|im_start|>"),
    "llama-3": (
        LLAMA_3,
        LLAMA_3.replace("<|begin_of_text|>", LLAMA_3_SYSTEM),
        ["A square.<|eot_id|>", "Red.<|eot_id|>"],
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "mistral": (
        MISTRAL,
        MISTRAL.replace("[INST] ", "[INST] Be brief.\n\n", 1),
        [" A square.</s>", " Red.</s>"],
        "<s>",
        "</s>",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("llava"), num_layers=1)


@pytest.fixture
def processor(folder: Path) -> Any:
    processor = load_tiny_llava(folder)[1]
    processor.tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in TOKENS])
    return processor


@pytest.mark.parametrize("name", CASES)
def test_it_writes_the_published_text_and_marks_the_answers_with_their_ends(name: str, processor: Any) -> None:
    text, with_system, answers, bos, end = CASES[name]
    processor.tokenizer.bos_token, processor.tokenizer.eos_token = bos, end
    processor.chat_template = read_template(name)
    encoder = ConversationEncoder(processor, processor.image_token_id, 5000)
    for turns, expected in (([*FIRST, *MORE], text), ([SYSTEM, *FIRST, *MORE], with_system)):
        rendered = encoder.render(turns, 1)
        assert rendered.text == expected
        assert [rendered.text[first:after] for first, after in rendered.spans] == answers
        encoded = encoder.encode(turns, [Image.new("RGB", (32, 32))])
        assert processor.tokenizer.decode(encoded.token_ids).replace("<image>" * 16, "<image>") == expected
        assert processor.tokenizer.decode(encoded.token_ids[encoded.answer_mask]) == "".join(answers)
    # A question is what stands before its answer; a string is what its parts are.
    prompt = encoder.encode_prompt("Its color?", [Image.new("RGB", (32, 32))], FIRST).token_ids
    whole = encoder.encode([*FIRST, *MORE], [Image.new("RGB", (32, 32))])
    last = int((whole.answer_mask & ~whole.answer_mask.roll(1)).nonzero()[-1])
    assert prompt.tolist() == whole.token_ids[:last].tolist()
    strings = [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": "A square."}]
    as_string, _ = render(processor.chat_template, strings, {"bos_token": bos or "", "eos_token": end})
    assert text.startswith(as_string)


def test_without_a_beginning_token_none_is_written(processor: Any) -> None:
    for name in ("llama-3", "mistral"):
        text, _ = render(read_template(name), [{"role": "user", "content": "Hi"}], {"eos_token": "</s>"})
        assert text.startswith(("<|start_header_id|>user", "[INST] Hi"))


@pytest.mark.slow
def test_chatml_is_the_text_of_smollm2s_own_template() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A square."},
    ]
    special_tokens = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    for added in (False, True):
        turns = messages[:2] if added else messages
        texts = [
            render(template, turns, special_tokens, add_generation_prompt=added)[0]
            for template in (smollm2_template(), read_template("chatml"))
        ]
        assert texts[0] == texts[1]
