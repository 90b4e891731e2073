"""Reads a checkpoint's config, and refuses files that name code, pickles, paths or other repositories."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from stages.checkpoints.processor_sizes import check_settings
from storage.digests import parse_json
from storage.errors import CorruptData, UserError, first_line
from storage.regular_files import read_regular

_NO_MODEL = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What the library raises for numbers and types in a config that no model has."""
_CONFIGS = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
_OF_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
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
_MAX_LAYERS = 4096
"""Layers, or experts of one, that a config may ask for: the library makes lists and modules of as many."""


def check_configs(folder: Path, *, with_model: bool = True) -> None:
    """Refuses a checkpoint whose configs name code, weights or models beside its own files.

    The `auto_map` of config.json is left alone where the library has the model type itself: its class is used then.
    Without the model, config.json and generation_config.json are not read.

    Raises:
        UserError: If one does, is no JSON object, is larger than `read_regular` allows, or as `read_config` and
            `check_settings`; names file
            and key.
    """
    if (folder / _AUDIO_TOKENIZER).exists():
        raise UserError(f"{folder / _AUDIO_TOKENIZER} names {_OTHER_MODEL}, which is refused; remove the file")
    for name in _CONFIGS if with_model else _CONFIGS[2:]:
        file = folder / name
        try:
            fields = read_config(folder) if name == "config.json" else _read(file)
        except FileNotFoundError:
            continue
        if name in _OF_PROCESSORS:
            check_settings(fields, file)
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
            cannot have, or more layers than are built.
    """
    if not trust_remote_code:
        check_configs(folder)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (*_NO_MODEL, OSError) as error:
        found = f"{folder / 'config.json'} cannot be read by transformers {transformers.__version__}"
        raise UserError(f"{found}: {first_line(error)}; expected a model's config that this version knows") from error
    return config


@contextmanager
def model_built_from(what: str) -> Iterator[None]:
    """Names the config, that of `what`, for which the library cannot build a model inside the block.

    The library checks few numbers. Under `torch.device("meta")` a model of any size is built without memory.

    Raises:
        UserError: Instead of what the library raises.
    """
    try:
        yield
    except _NO_MODEL as error:
        found = f"the config of {what} describes no model that can be built ({type(error).__name__}"
        raise UserError(f"{found}: {first_line(error)}); fetch the checkpoint again, or use another") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of config.json.

    Raises:
        UserError: If it is no JSON object, or asks for more layers or experts than are built.
        FileNotFoundError: If there is none.
    """
    file = folder / "config.json"
    fields = _read(file)
    for key, count in _too_many(fields):
        found = f"{file} asks for {key} {count}, at most {_MAX_LAYERS} are built"
        raise UserError(f"{found}; fetch the checkpoint again, or use another")
    return fields


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


def _too_many(value: Any) -> Iterator[tuple[str, int]]:
    """(key, count) at any depth of more layers or experts than are built."""
    if isinstance(value, list):
        for part in value:
            yield from _too_many(part)
    elif isinstance(value, dict):
        for key, part in value.items():
            counts = "layer" in key or key == "depth" or ("num" in key and "experts" in key)
            if counts and isinstance(part, int) and part > _MAX_LAYERS:
                yield key, part
            yield from _too_many(part)
