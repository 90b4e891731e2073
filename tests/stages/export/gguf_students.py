"""Tiny LLaVA 1.5 models with each decoder, tokenizer and vision tower that a GGUF file is written for."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.checkpoints import CHAT_TEMPLATE

TEXTS = ("What is the colour? 12  345", "a red   square\n\n\tis  here 'twas IT'S it's", "Grüße 你好 🙂 é x\u0301 ٣٤")
_QWEN_2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_3 = _QWEN_2.replace(r"\p{N}|", r"\p{N}{1,3}|")
_PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _split(pattern: str) -> Any:
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), whole])


SPLITS: dict[str, Any] = {
    "qwen2": _split(_QWEN_2),
    "llama-bpe": _split(_LLAMA_3),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _PLAIN]),
    "gpt-2": _PLAIN,
}
DECODERS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "qwen2": (Qwen2Config, "qwen2", {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, "qwen2", {"head_dim": 128}),
    "smollm2": (LlamaConfig, "smollm", {"tie_word_embeddings": True}),
    "llama 3.1": (
        LlamaConfig,
        "llama-bpe",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        },
    ),
    "llama, linear": (
        LlamaConfig,
        "gpt-2",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
}
"""Config, what the tokenizer splits by, settings."""


def make_tokenizer(split: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of a kind, with an image token and one that is not special."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=split == "llama-bpe"))
    tokenizer.pre_tokenizer, tokenizer.decoder = SPLITS[split], decoders.ByteLevel()
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>", "<|pad|>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ["What is the color of the square? 123 12 12 345", "a red   square is here, it's\n\n\tIT'S red, Grüße"] * 3
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.add_tokens(["<think>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")


def make_llava(folder: Path, decoder: str, tower: str = "siglip", **changes: Any) -> Path:
    """A random LLaVA; `changes` are settings of its config."""
    config_class, split, settings = DECODERS[decoder]
    tokenizer = make_tokenizer(split)
    text = config_class(
        vocab_size=len(tokenizer) + 3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.25,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
        **settings,
    )
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    shape |= {"image_size": 32, "patch_size": 8}
    vision = SiglipVisionConfig(**shape, vision_use_head=False) if tower == "siglip" else CLIPVisionConfig(**shape)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=2,
        image_seq_length=16,
        **{
            "vision_feature_select_strategy": "full" if tower == "siglip" else "default",
            "vision_feature_layer": -1 if tower == "siglip" else -2,
            "tie_word_embeddings": text.tie_word_embeddings,
        }
        | changes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = LlavaForConditionalGeneration(config)
        for name, parameter in model.named_parameters():
            # Biases and norms that stand for something, so that a mistake in one is seen.
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.2)
    model.save_pretrained(folder)
    sides = {"height": 32, "width": 32}
    cropped = {"size": {"shortest_edge": 32}, "crop_size": sides}
    pictures = SiglipImageProcessorPil(size=sides) if tower == "siglip" else CLIPImageProcessor(**cropped)
    LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(tower == "clip"),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder
