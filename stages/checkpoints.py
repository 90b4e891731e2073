"""Hugging Face checkpoints: finding them, naming exactly which one it is, refusing what could run code."""

import hashlib
import json
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import logging as transformers_logging

from stages.weights import WEIGHTS, check_files
from storage.digests import parse_json
from storage.errors import UserError

MAX_CONFIG_BYTES = 64 * 2**20
"""Largest config that is read; real ones have kilobytes."""

_NEEDED_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]

_VIDEO = "video_processor"


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
        if not file.is_file():
            continue
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise UserError(f"{file} has {file.stat().st_size} bytes, at most {MAX_CONFIG_BYTES} are read of a config")
        fields = parse_json(file.read_bytes(), str(file))
        if not isinstance(fields, dict):
            raise UserError(f"{file} holds no JSON object; expected a Hugging Face config")
        known = name != "config.json" or fields.get("model_type") in CONFIG_MAPPING
        if "auto_map" in fields and not known:
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
        raise UserError(
            f"{folder / 'config.json'} cannot be read by transformers {transformers.__version__}: "
            f"{_first_line(error)}; expected "
            "the config of a model that this version knows"
        ) from error
    return config


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def hide_loading_bars() -> None:
    """Stops transformers from drawing its own bar for each checkpoint, through those of the command."""
    transformers_logging.disable_progress_bar()


def load_processor(folder: Path, *, trust_remote_code: bool = False) -> ProcessorMixin:
    """A checkpoint's processor; see `images_only` for those that also read videos.

    Raises:
        UserError: If the library lacks a package for it, or its files are missing or damaged.
    """
    try:
        cls = None if trust_remote_code else _processor_class(folder)
        processor: ProcessorMixin = (
            AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
            if cls is None or _VIDEO not in cls.get_attributes()
            else images_only(cls).from_pretrained(folder)
        )
    except ImportError as error:
        raise UserError(
            f"the processor of {folder} cannot be built here: {error} (SmolVLM: pip install 'compodistill[smolvlm]')"
        ) from error
    # For a damaged tokenizer.json the library raises a bare Exception.
    except Exception as error:
        raise UserError(
            f"{folder} has no processor that can be read ({type(error).__name__}: {_first_line(error)}); expected "
            "processor_config.json or preprocessor_config.json, tokenizer_config.json and tokenizer.json in it, whole: "
            "fetch or save them again"
        ) from error
    if not isinstance(processor, ProcessorMixin):
        raise UserError(
            f"{folder} has a {type(processor).__name__} and no processor for images and text; expected "
            "processor_config.json or preprocessor_config.json beside the tokenizer: fetch or save them again"
        )
    return processor


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A checkpoint's tokenizer.

    Raises:
        UserError: If its files are missing or damaged.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # As in `load_processor`.
    except Exception as error:
        raise UserError(
            f"{folder} has no tokenizer that can be read ({type(error).__name__}: {_first_line(error)}); expected "
            "tokenizer_config.json and tokenizer.json in it, whole: fetch or save them again"
        ) from error
    return tokenizer


def images_only(cls: Any) -> Any:
    """A processor class of the library without the half that reads videos.

    That half is never used here, and the library builds it only where torchvision is installed. It is left out
    everywhere, so that a fingerprint does not depend on the machine.
    """
    attributes = [name for name in cls.get_attributes() if name != _VIDEO]

    def arguments(*args: Any, **kwargs: Any) -> list[Any]:
        # One of these classes takes the video half as an argument without a default; it is the last in all of them.
        return [*cls._get_arguments_from_pretrained.__func__(without, *args, **kwargs), None]

    # The class keeps its name, which is what is saved and what finds it again.
    without = type(
        cls.__name__,
        (cls,),
        {
            "get_attributes": classmethod(lambda _: attributes),
            "_get_arguments_from_pretrained": staticmethod(arguments),
            # Loading workers may be started afresh and get it by pickle, which knows no class made here.
            "__reduce__": lambda self: (_remade, (cls, self.__dict__)),
        },
    )
    return without


def _remade(cls: Any, state: dict[str, Any]) -> Any:
    without = images_only(cls)
    processor = without.__new__(without)
    processor.__dict__.update(state)
    return processor


def _processor_class(folder: Path) -> Any:
    """The library's class that the folder names, None if it names none."""
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        path = folder / name
        named = json.loads(path.read_text(encoding="utf-8")).get("processor_class") if path.is_file() else None
        if named is not None:
            return getattr(transformers, named, None)
    return None


def image_processor_backend(processor: Any) -> str:
    """Class name of what makes the pixels, such as `SiglipImageProcessorPil`; the saved JSON lacks it."""
    return type(processor.image_processor).__name__


def weights_digest(folder: Path) -> str:
    """sha256 over the names and contents of all weight files."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob(WEIGHTS)):
        with path.open("rb") as file:
            digest.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over everything that decides which ids a text gets.

    Raises:
        UserError: If it is a slow tokenizer, whose rules cannot be written down.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} is not a fast tokenizer; convert it to tokenizer.json first")
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    # Truncation and padding are call-time settings that happen to be saved in the same place.
    rules = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()
