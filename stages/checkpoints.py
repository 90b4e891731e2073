"""Hugging Face checkpoints: finding them, naming exactly which one it is, refusing what could run code."""

import hashlib
import json
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from storage.errors import UserError

_NEEDED_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]  # no *.bin: those are pickles


def resolve_checkpoint(name: str | Path) -> Path:
    """The local folder of a checkpoint: a folder as it is, else a model id of the hub, downloaded once.

    Raises:
        UserError: no such folder or id, or a checkpoint without safetensors weights.
    """
    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(name), allow_patterns=_NEEDED_FILES))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise UserError(
                f"no checkpoint at {name}: it is neither a folder here nor a model id that the hub gave "
                f"({type(error).__name__}); check the path"
            ) from error
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json; expected a Hugging Face checkpoint folder")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} holds no *.safetensors weights; pickled weights are not loaded, convert them first")
    return folder


def hide_loading_bars() -> None:
    """Transformers draws a bar for each checkpoint it reads, through those of the command."""
    transformers_logging.disable_progress_bar()


def weights_digest(folder: Path) -> str:
    """sha256 over the names and contents of all weight files."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over everything that decides which ids a text gets.

    Raises:
        UserError: a slow tokenizer, whose rules cannot be written down.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} is not a fast tokenizer; convert it to tokenizer.json first")
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    # Truncation and padding are call-time settings that happen to be saved in the same place.
    rules = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()
