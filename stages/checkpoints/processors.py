"""A checkpoint's processor and tokenizer, without the half of a processor that reads videos."""

import hashlib
import json
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.convert_slow_tokenizer import import_protobuf
from transformers.tokenization_utils_base import generate_merges
from transformers.utils import is_torchvision_available
from transformers.utils import logging as transformers_logging

from stages.checkpoints.configs import check_configs
from stages.checkpoints.processor_sizes import check_processor
from stages.checkpoints.tokenizer_rules import check_tokenizer
from storage.errors import UserError, first_line
from storage.regular_files import read_regular

_VIDEO = "video_processor"
_CONFIGS = "processor_config.json or preprocessor_config.json"


def load_processor(folder: Path, *, trust_remote_code: bool = False) -> ProcessorMixin:
    """A checkpoint's processor; see `images_only` for those that also read videos.

    Raises:
        UserError: As `check_configs`, `check_tokenizer` and `check_processor`; if the library lacks a package for it,
            or its files are missing or damaged.
    """
    if not trust_remote_code:
        check_configs(folder)
        check_tokenizer(folder)
    try:
        cls = None if trust_remote_code else _processor_class(folder)
        processor: ProcessorMixin = (
            AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
            if cls is None or _VIDEO not in cls.get_attributes()
            else images_only(cls).from_pretrained(folder, trust_remote_code=False)
        )
    # For a damaged tokenizer.json the library raises a bare Exception, for some missing packages a ValueError.
    except Exception as error:
        if not is_torchvision_available() and "torchvision" in str(error).lower():
            raise UserError(
                f"the processor of {folder} needs torchvision, which is not installed; install the one that belongs to "
                "this PyTorch (https://pytorch.org/get-started/locally/)"
            ) from error
        if isinstance(error, ImportError):
            raise UserError(
                f"the processor of {folder} cannot be built here: {first_line(error)} "
                "(SmolVLM: pip install 'compodistill[smolvlm]')"
            ) from error
        raise UserError(
            f"{folder} has no processor that can be read ({type(error).__name__}: {first_line(error)}); expected "
            f"{_CONFIGS}, tokenizer_config.json and tokenizer.json in it, whole: fetch or save them again"
        ) from error
    if isinstance(getattr(processor, "tokenizer", None), PreTrainedTokenizerBase):
        _merge_by_scores(processor.tokenizer, folder)
    if not isinstance(processor, ProcessorMixin):
        found = f"{folder} has a {type(processor).__name__} and no processor for images and text"
        raise UserError(f"{found}; expected {_CONFIGS} beside the tokenizer: fetch or save them again")
    if not trust_remote_code:
        check_processor(processor, folder)
    return processor


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A checkpoint's tokenizer.

    Raises:
        UserError: As `check_configs` and `check_tokenizer`; if its files are missing or damaged.
    """
    check_configs(folder)
    check_tokenizer(folder)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if _is_another_model(tokenizer, folder):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
    # As in `load_processor`.
    except Exception as error:
        raise UserError(
            f"{folder} has no tokenizer that can be read ({type(error).__name__}: {first_line(error)}); expected "
            "tokenizer_config.json and tokenizer.json in it, whole: fetch or save them again"
        ) from error
    _merge_by_scores(tokenizer, folder)
    return tokenizer


def _is_another_model(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Whether a class that transformers took by the decoder's type made another kind of tokenizer of tokenizer.json.

    Of a word list beside a Qwen2 it makes a BPE without merges, which reads every text as nothing.
    """
    file = folder / "tokenizer.json"
    if not file.is_file() or not tokenizer.is_fast:
        return False
    written = json.loads(read_regular(file))["model"].get("type", "")
    made: str = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["type"]
    return written not in ("", made)


def _merge_by_scores(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Puts the merges of a bare SentencePiece model in the order of its scores, as SentencePiece itself merges.

    transformers takes the order of the ids, in which the runs of spaces of Mistral's models have another place.
    """
    file = folder / "tokenizer.model"
    if (folder / "tokenizer.json").is_file() or not file.is_file() or not tokenizer.is_fast:
        return
    try:
        model = import_protobuf().ModelProto.FromString(read_regular(file))
    # Tiktoken's ranks have the same file name; and the library reads no such model without the package for it.
    except Exception:
        return
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    if rules["model"]["type"] == "BPE":
        vocab = rules["model"]["vocab"]
        scores = {piece.piece: piece.score for piece in model.pieces if piece.piece in vocab}
        rules["model"]["merges"] = [list(pair) for pair in generate_merges(vocab, scores)]
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(rules))


def images_only(cls: Any) -> Any:
    """A processor class of the library without the half that reads videos.

    That half is never used here, and the library builds it only where torchvision is installed. It is left out
    everywhere, so that a fingerprint does not depend on the machine.
    """
    attributes = [name for name in cls.get_attributes() if name != _VIDEO]

    def arguments(*args: Any, **kwargs: Any) -> list[Any]:
        # One of these classes takes the video half as an argument without a default; it is the last in all of them.
        return [*cls._get_arguments_from_pretrained.__func__(without, *args, **kwargs), None]

    methods = {
        "get_attributes": classmethod(lambda _: attributes),
        "_get_arguments_from_pretrained": staticmethod(arguments),
        # Loading workers may be started afresh and get it by pickle, which knows no class made here.
        "__reduce__": lambda self: (_remade, (cls, self.__dict__)),
    }
    # The class keeps its name, which is what is saved and what finds it again.
    without = type(cls.__name__, (cls, _GivenNoVideos), methods)
    return without


class _GivenNoVideos(ProcessorMixin):  # type: ignore[misc]
    """Stands behind a class of the library that hands on an argument for the half that it lacks (Gemma 4)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.pop(_VIDEO, None)
        super().__init__(*args, **kwargs)


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


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over everything that decides which ids a text gets.

    Raises:
        UserError: If it is a slow tokenizer, whose rules cannot be written down.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} is not a fast tokenizer; convert it to tokenizer.json first")
    saved = json.loads(tokenizer.backend_tokenizer.to_str())
    # Truncation and padding are call-time settings that happen to be saved in the same place.
    rules = {key: value for key, value in saved.items() if key not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def hide_loading_bars() -> None:
    """Stops transformers from drawing its own bar for each checkpoint, through those of the command."""
    transformers_logging.disable_progress_bar()
