"""Writes GGUF files of tiny decoders, with values of 32 bits so that nothing is rounded."""

import json
from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH, GGUFWriter, TokenType, get_tensor_name_map
from transformers import AutoModelForCausalLM, AutoTokenizer


def make_gguf(
    file: Path,
    decoder: Path,
    *,
    split: str = "gpt-2",
    misnamed: str = "",
    rotation: torch.Tensor | None = None,
    **settings: int | str,
) -> Path:
    """The Qwen2 decoder of a folder as a GGUF file.

    Args:
        file: To write.
        decoder: A folder that `tests.checkpoints.make_tiny_lm` made.
        split: How the file says that its vocabulary splits text.
        misnamed: A tensor that is written by another name than this, which files have for it.
        rotation: Written as `rope_freqs.weight`: what rotary frequencies are divided by.
        settings: By their keys in the file, with `__` for each dot: numbers and texts that are written besides, or in
            place of those of the decoder.
    """
    model = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32)
    tokenizer, config = AutoTokenizer.from_pretrained(decoder), model.config
    values: dict[str, int | str | float] = {
        "qwen2.context_length": config.max_position_embeddings,
        "qwen2.embedding_length": config.hidden_size,
        "qwen2.block_count": config.num_hidden_layers,
        "qwen2.feed_forward_length": config.intermediate_size,
        "qwen2.attention.head_count": config.num_attention_heads,
        "qwen2.attention.head_count_kv": config.num_key_value_heads,
        "qwen2.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "qwen2.rope.freq_base": config.rope_parameters["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        **({"tokenizer.chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}),
        **{name.replace("__", "."): value for name, value in settings.items()},
    }
    writer = GGUFWriter(file, "qwen2")
    for name, value in values.items():
        add = {int: writer.add_uint32, str: writer.add_string, float: writer.add_float32}[type(value)]
        add(name, value)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    control = set(tokenizer.all_special_ids)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if n in control else TokenType.NORMAL for n in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in merges_of(tokenizer)])
    names = get_tensor_name_map(MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        written = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor("other" if written == misnamed else written, tensor.numpy())
    if rotation is not None:
        writer.add_tensor("rope_freqs.weight", rotation.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def merges_of(tokenizer: Any) -> list[tuple[str, str]]:
    """Of a byte-level tokenizer, in their order."""
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return [tuple(pair) for pair in merges]
