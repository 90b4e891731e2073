"""Reads a checkpoint's config, and refuses files that name code, pickles, paths or other repositories."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from stages.checkpoints.config_files import CONFIG, read_config
from stages.checkpoints.processor_sizes import check_settings
from storage.errors import UserError, first_line

_CONFIGS = (
    CONFIG,
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
_UNFIT = (
    StrictDataclassError,
    SafetensorError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    OSError,
)
"""What the library raises for files that hold something else than it expects."""


def check_configs(folder: Path, *, with_model: bool = True) -> None:
    """Refuses a checkpoint whose configs name code, weights or models beside its own files.

    The `auto_map` of config.json is left alone where the library has the model type itself: its class is used then.
    Without the model, config.json and generation_config.json are not read.

    Raises:
        UserError: If one does, or as `read_config` and `check_settings`; names file and key.
    """
    if (folder / _AUDIO_TOKENIZER).exists():
        raise UserError(f"{folder / _AUDIO_TOKENIZER} names {_OTHER_MODEL}, which is refused; remove the file")
    for name in _CONFIGS if with_model else _CONFIGS[2:]:
        file = folder / name
        try:
            fields = read_config(file)
        except FileNotFoundError:
            continue
        if name in _OF_PROCESSORS:
            check_settings(fields, file)
        known = name == CONFIG and fields.get("model_type") in CONFIG_MAPPING
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
    with unfit_named(folder / CONFIG):
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return config


@contextmanager
def unfit_named(what: Path | str) -> Iterator[None]:
    """What the library raises in the block for files that hold what it does not expect says `what` it was reading.

    The library checks few numbers; under `torch.device("meta")` it builds a model of any size without memory. Not for
    what takes memory on a device: the lack of it would be one of these.

    Raises:
        UserError: Instead of these.
    """
    try:
        yield
    except _UNFIT as error:
        found = f"{what} cannot be read by transformers {transformers.__version__}"
        raise UserError(
            f"{found}: {type(error).__name__}: {first_line(error)}; expected a model's config that this version knows, "
            "and the files that belong to it"
        ) from error


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
