"""Reads a checkpoint's config, and refuses files that name code, pickles, paths or other repositories."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from storage.digests import parse_json
from storage.errors import CorruptData, UserError, first_line
from storage.regular_files import read_regular

_CONFIGS = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
_AUDIO_TOKENIZER = "audio_tokenizer_config.json"
_CODE, _OTHER_MODEL, _OTHER_FILES = "code of its own", "another model by its path", "other files than the usual ones"
_REFUSED = {
    "auto_map": _CODE,
    "audio_tokenizer": _OTHER_MODEL,
    "transformers_weights": _OTHER_FILES,
    "configuration_files": _OTHER_FILES,
    "fast_tokenizer_files": _OTHER_FILES,
    "init_inputs": _OTHER_FILES,
}
"""Keys by which the library would load more than the folder's usual files -> what they name."""


def check_configs(folder: Path, *, with_model: bool = True) -> None:
    """Refuses a checkpoint whose configs name code, weights or models beside its own files.

    The `auto_map` of config.json is left alone where the library has the model type itself: its class is used then.
    Without the model, config.json and generation_config.json are not read.

    Raises:
        UserError: If one does, is no JSON object, or is larger than `read_regular` allows; names file and key.
    """
    if (folder / _AUDIO_TOKENIZER).exists():
        raise UserError(f"{folder / _AUDIO_TOKENIZER} names {_OTHER_MODEL}, which is refused; remove the file")
    for name in _CONFIGS if with_model else _CONFIGS[2:]:
        file = folder / name
        try:
            fields = _read(file)
        except FileNotFoundError:
            continue
        known = name == "config.json" and fields.get("model_type") in CONFIG_MAPPING
        for key, value in _named(fields | {"auto_map": None} if known else fields):
            what = _REFUSED.get(key, "code of another repository")
            raise UserError(
                f"{file} asks for {what} ({key}: {value}), which is refused: "
                "give a checkpoint of a family that transformers has, or remove the key; for a teacher whose code you "
                "have read there is --set teacher.trust_remote_code=true"
            )


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """A checkpoint's config.

    Raises:
        UserError: As `check_configs`; if the installed transformers does not know its type, or it holds what its type
            cannot have.
    """
    if not trust_remote_code:
        check_configs(folder)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, TypeError, KeyError, OSError, StrictDataclassError) as error:
        found = f"{folder / 'config.json'} cannot be read by transformers {transformers.__version__}"
        raise UserError(f"{found}: {first_line(error)}; expected a model's config that this version knows") from error
    return config


def _read(file: Path) -> dict[str, Any]:
    try:
        fields = parse_json(read_regular(file), str(file))
    except CorruptData as error:
        raise CorruptData(f"{first_line(error).partition(';')[0]}; fetch or save them again") from error
    if not isinstance(fields, dict):
        raise CorruptData(f"{file} holds no JSON object; expected a Hugging Face config: fetch or save them again")
    return fields


def _named(value: Any) -> Iterator[tuple[str, Any]]:
    """(key, value) of everything at any depth that is refused."""
    if isinstance(value, list):
        for part in value:
            yield from _named(part)
    elif isinstance(value, dict):
        for key, part in value.items():
            # Kernels of the hub are named where the attention is: owner/repository.
            kernel = key.endswith(("attn_implementation", "experts_implementation")) and "/" in str(part)
            if part and (key in _REFUSED or kernel):
                yield key, part
            yield from _named(part)
