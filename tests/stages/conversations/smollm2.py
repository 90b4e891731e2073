"""The tokenizer and chat template of SmolLM2-135M-Instruct, out of its GGUF file."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.real_models import smollm2


@cache
def _fields() -> dict[str, list[str]]:
    names = ("tokenizer.chat_template", "tokenizer.ggml.tokens", "tokenizer.ggml.merges")
    with tempfile.TemporaryDirectory() as folder:
        found = GGUFReader(smollm2(Path(folder))).fields
        return {name: [bytes(found[name].parts[part]).decode() for part in found[name].data] for name in names}


def smollm2_template() -> str:
    """Its own template, which takes strings."""
    (template,) = _fields()["tokenizer.chat_template"]
    return template


def smollm2_tokenizer(post_processor: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 49,152 tokens."""
    vocab = {token: number for number, token in enumerate(_fields()["tokenizer.ggml.tokens"])}
    merges = [(left, right) for left, right in (line.split(" ") for line in _fields()["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder, tokenizer.post_processor = decoders.ByteLevel(), post_processor
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>"},
    )
