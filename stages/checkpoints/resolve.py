"""Finds a Hugging Face checkpoint and its config, and refuses what could run code."""

from pathlib import Path

import transformers
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from stages.checkpoints.weights import WEIGHTS, check_files
from storage.digests import parse_json
from storage.errors import UserError, first_line
from storage.regular_files import read_regular, refuse_special_files

_NEEDED_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]


def resolve_checkpoint(name: str | Path, *, with_weights: bool = True) -> Path:
    """The local folder of a checkpoint: a folder as it is, else a model id of the hub, downloaded once.

    Raises:
        UserError: If there is none, or its safetensors weights are missing or not whole.
    """
    folder = Path(name)
    if not folder.is_dir():
        patterns = _NEEDED_FILES + [WEIGHTS] * with_weights
        try:
            folder = Path(snapshot_download(str(name), allow_patterns=patterns))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise UserError(
                f"no checkpoint at {name}: it is neither a folder here nor a model id that the hub gave "
                f"({type(error).__name__}); check the path"
            ) from error
    # The library would wait for ever for a FIFO among them.
    refuse_special_files(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json; expected a Hugging Face checkpoint folder")
    if with_weights:
        check_files(folder)
    return folder


def in_hub_cache(name: str) -> bool:
    """Whether this machine got a model of that id from the hub; asks nothing of the network."""
    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False


def refuse_code(folder: Path) -> None:
    """Refuse a checkpoint that can only be loaded by running Python code that comes with it.

    One of a family that the library has itself is loaded by the library's code, whatever its configs name.

    Raises:
        UserError: If its `auto_map` names code and the library does not know its model type.
    """
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        file = folder / name
        try:
            fields = parse_json(read_regular(file), str(file))
        except FileNotFoundError:
            continue
        if not isinstance(fields, dict):
            raise UserError(f"{file} holds no JSON object; expected a Hugging Face config")
        if "auto_map" in fields and name == "config.json" and fields.get("model_type") not in CONFIG_MAPPING:
            raise UserError(
                f"{file} asks to run code of its own (auto_map {fields['auto_map']}), which is refused: give a "
                "checkpoint of a family that transformers has; for a teacher whose code you have read there is --set "
                "teacher.trust_remote_code=true"
            )


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """A checkpoint's config.

    Raises:
        UserError: If the installed transformers does not know its type, or it holds what its type cannot have.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, TypeError, KeyError, OSError, StrictDataclassError) as error:
        found = f"{folder / 'config.json'} cannot be read by transformers {transformers.__version__}"
        raise UserError(f"{found}: {first_line(error)}; expected a model's config that this version knows") from error
    return config
