"""A GGUF file as a decoder: converted once into a checkpoint of safetensors in this machine's cache."""

import io
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from hashlib import file_digest
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from stages.checkpoints.configs import unfit_named
from stages.checkpoints.gguf import GgufHead, read_decoder_head, read_floats
from stages.checkpoints.tokenizer_rules import panics_raised
from stages.checkpoints.weights import check_complete
from storage.digests import digest_of
from storage.errors import CorruptData, UserError, first_line
from storage.regular_files import open_regular
from storage.stores.cache import cache_dir, cached

logger = logging.getLogger(__name__)

_CONVERSION = 2
"""Raised when this file makes something else of the same bytes."""
_ROTATION = "rope_freqs.weight"
_LLAMA_3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_BYTE_LEVEL = "gpt2"
_PLAIN = {"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling"}
_DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
_WORDS_BEFORE_MERGES = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"}
"""How byte-level vocabularies split text, by the name in `tokenizer.ggml.pre`: as GPT-2 did; the same after each digit
stands alone; and those that take a word which is a token as it is. The library takes the first for all that it does not
know."""


def gguf_digest(file: Path) -> str:
    """sha256 of the file."""
    with open_regular(file) as opened:
        return file_digest(opened, "sha256").hexdigest()


def converted(file: Path) -> Path:
    """The folder of a checkpoint with what a GGUF file holds: weights in 32 bits, config, tokenizer, chat template.

    It lies in this machine's cache and is made again when the file or the version of transformers changes.

    Raises:
        UserError: If the `gguf` package is missing, or the file is damaged, or it holds no causal language model or a
            tokenizer that the library would read wrongly.
    """
    head = read_decoder_head(file)
    _check_kept(file, head)
    seen, digest = file.stat(), gguf_digest(file)

    def fill(folder: Path) -> None:
        # The library says nothing for as long as it takes.
        logger.warning("%s: its %.3g weights become a checkpoint, once; this may take minutes", file, head.num_weights)
        started = time.perf_counter()
        _convert(file, head, folder)
        if (now := file.stat()) != seen and (now.st_mtime_ns, now.st_size) != (seen.st_mtime_ns, seen.st_size):
            raise CorruptData(f"{file} changed while it was read; start again when it is whole")
        logger.warning("%s: read in %.1f s, kept in %s", file, time.perf_counter() - started, cache_dir())

    key = digest_of([digest, transformers.__version__, _CONVERSION])[:32]
    return cached(key, 4 * head.num_weights, fill, None)


def _check_kept(file: Path, head: GgufHead) -> None:
    """Refuses what the library would leave out without a word."""
    split = head.fields.get("tokenizer.ggml.pre")
    known = _PLAIN | _DIGITS_APART | _WORDS_BEFORE_MERGES | set(GGUF_PRE_TOKENIZER_SPLITS)
    if head.fields.get("tokenizer.ggml.model") == _BYTE_LEVEL and split not in known:
        raise UserError(
            f"{file} splits text as {split!r:.100} (tokenizer.ggml.pre), which is not known here, so that words could "
            "become other tokens than the decoder learned; name the checkpoint it was made from"
        )


def _restore_rotation(file: Path, head: GgufHead, config: PreTrainedConfig) -> None:
    """Puts the scaling of rotary frequencies, which a tensor of the file holds, into the config.

    The library does not read that tensor. That of Llama 3.1 and later follows from one number, its largest value.

    Raises:
        UserError: If it is of another kind.
    """
    scaled = sorted(name for name in head.shapes if name.startswith(("rope_freqs", "rope_factors")))
    if not scaled:
        return
    factors_d = torch.tensor(read_floats(file, head, scaled[0]))
    plain = dict(getattr(config, "rope_parameters", None) or {})
    if scaled == [_ROTATION] and len(factors_d) and plain.get("rope_type") == "default":
        config.rope_parameters = plain | _LLAMA_3 | {"factor": float(factors_d.max())}
        frequencies_d, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        dims_d = torch.arange(len(frequencies_d)) / len(frequencies_d)
        unscaled_d = float(plain["rope_theta"]) ** -dims_d
        if len(factors_d) == len(frequencies_d) and torch.allclose(frequencies_d * factors_d, unscaled_d, rtol=1e-4):
            return
    raise UserError(
        f"{file} holds {', '.join(scaled)}: its rotary frequencies are scaled in a way that is not known here, so the "
        "decoder would be another model; name the checkpoint it was made from"
    )


def _convert(file: Path, head: GgufHead, folder: Path) -> None:
    # The library draws a bar of its own.
    with _alone(file) as link, unfit_named(file), panics_raised(), redirect_stderr(io.StringIO()):
        config = AutoConfig.from_pretrained(link.parent, gguf_file=link.name, trust_remote_code=False)
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise UserError(f"{file} holds a {config.model_type}, which is no causal language model; name another")
        _restore_rotation(file, head, config)
        with torch.device("meta"):
            expected = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        _check_sizes(file, head, expected)
        tokenizer = _tokenizer(link, head, file)
        model, found = AutoModelForCausalLM.from_pretrained(
            link.parent,
            gguf_file=link.name,
            config=config,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    check_complete(found, file)
    for left in ("_model_name_or_path", "quantization_config"):
        model.config.__dict__.pop(left, None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _alone(file: Path) -> Iterator[Path]:
    """A link to the file in a folder of its own: the library obeys adapters and tokenizers that lie beside a file."""
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "decoder.gguf"
        link.symlink_to(file.resolve())
        yield link


def _check_sizes(file: Path, head: GgufHead, expected: Any) -> None:
    """What the file lacks, the library makes in any size that the config says."""
    num_weights = sum(parameter.numel() for parameter in expected.parameters())
    num_buffers = sum(buffer.numel() for buffer in expected.buffers())
    if max(num_weights, num_buffers) > head.num_weights:
        raise CorruptData(
            f"{file} describes a {type(expected).__name__} of {num_weights:,} weights and holds {head.num_weights:,}; "
            "fetch it again"
        )


def _tokenizer(link: Path, head: GgufHead, file: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of `file`, splitting as it says, without what the library notes of the loading."""
    try:
        loaded: Any = AutoTokenizer.from_pretrained(link.parent, gguf_file=link.name, trust_remote_code=False)
    # For merges that are no tokens the library raises a bare Exception.
    except Exception as error:
        raise CorruptData(
            f"{file} has no tokenizer that can be read ({type(error).__name__}: {first_line(error)}); fetch it again"
        ) from error
    backend, split = loaded.backend_tokenizer, head.fields.get("tokenizer.ggml.pre")
    if head.fields.get("tokenizer.ggml.model") == _BYTE_LEVEL:
        if split in _DIGITS_APART:
            digits = pre_tokenizers.Digits(individual_digits=True)
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
            )
        backend.model.ignore_merges = split in _WORDS_BEFORE_MERGES
    named = {name: token for name, token in loaded.special_tokens_map.items() if isinstance(token, str)}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=loaded.chat_template, **named)
