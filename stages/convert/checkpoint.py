"""Converts a released checkpoint; every tensor is accounted for before anything is written.

Weight files are copied one by one under new names, so that no more than the largest of them is in memory.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedConfig

from stages.checkpoints.configs import unfit_named
from stages.checkpoints.new_folder import check_new, new_folder
from stages.checkpoints.resolve import resolve_checkpoint
from stages.checkpoints.weight_files import INDEX, SINGLE, some, weight_files
from stages.convert.layout import converted_config, converted_name
from stages.convert.processor import IMAGE_TOKEN, load_image_processor, load_tokenizer, make_processor, named_tokenizer
from stages.convert.released_config import read_released_config
from stages.student.model.modeling_compodistill import (
    CompoDistillStudentConfig,
    CompoDistillStudentForConditionalGeneration,
)
from storage.errors import UserError
from storage.progress import SILENT, Progress
from storage.strict_model import StrictModel

REPORT = "conversion.json"
_DTYPES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


class ConversionReport(StrictModel):
    """What was converted; `conversion.json` beside the weights."""

    source: str
    """The released checkpoint."""
    layout: str
    """Its model type."""
    model_type: str
    """Model type of the converted checkpoint: llava, or this project's own for a student with a post-connector."""
    tensors: int
    bytes: int
    """Of all weights."""
    dtype: str
    """Of the decoder's weights; every tensor keeps its own."""
    image_token_id: int
    """Stands where the released code has -200."""
    added_rows: int
    """Rows of zeros put to the vocabulary because it had no id left for the image token; 0 for most models. The logit
    of such a row is always 0."""
    tokenizer_from: str | None
    """Where the tokenizer was read. None: the checkpoint has none and none was given, so no processor was written;
    such a folder is a model, but not yet a teacher."""
    tokenizer_named: str | None
    """What the checkpoint's config names as its tokenizer; nothing is fetched because a file names it."""
    image_processor_from: str
    """Where the image processor was read, or that it was made of the vision tower's config."""
    seconds: float


@dataclass(frozen=True)
class _Source:
    """A tensor of a released file: file and name there, shape and type."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def convert_checkpoint(
    source: str | Path,
    output: Path,
    *,
    tokenizer: str | None = None,
    image_processor: str | None = None,
    progress: Progress = SILENT,
) -> ConversionReport:
    """Writes `output`, a Hugging Face folder with processor and chat template.

    A teacher, and a student trained without a post-connector, become a stock Llava. A student with a post-connector
    becomes this project's student model, since Llava's projector has the decoder's width.

    Tokenizer and image processor are those of the source, unless given as folder or hub id.

    Raises:
        UserError: If the layout is unknown, weights are pickled, tensors or shapes are missing or unexpected, or
            `output` holds something. Nothing is left behind then.
    """
    started = time.perf_counter()
    output = Path(output)
    check_new(output)
    folder = resolve_checkpoint(source)
    with unfit_named(folder):
        released = read_released_config(folder)
        tensors = _named_tensors(folder)
        words, tokenizer_from = load_tokenizer(folder, tokenizer)
        if EMBEDDING not in tensors:
            raise UserError(f"{folder} has no tensor that would become {EMBEDDING}; its decoder is missing")
        num_rows = tensors[EMBEDDING].shape[0]
        # Without a tokenizer nobody knows which ids are free.
        image_token_id = num_rows if words is None else int(words.convert_tokens_to_ids(IMAGE_TOKEN))
        added_rows = max(0, image_token_id + 1 - num_rows)
        dtype = tensors[EMBEDDING].dtype
        if dtype not in _DTYPES.values():
            raise UserError(f"the decoder's weights in {folder} are {dtype}, expected {', '.join(_DTYPES.values())}")
        config = converted_config(released, image_token_id, num_rows + added_rows, dtype)
        _check_tensors(folder, tensors, config, added_rows)
        images, images_from = load_image_processor(folder, released, image_processor)
        strategy = config.vision_feature_select_strategy
        processor = None if words is None else make_processor(released, words, images, strategy)

    with new_folder(output) as staging:
        num_bytes = _write_weights(tensors, staging, added_rows, progress)
        config.architectures = [_model_class(config).__name__]
        config.save_pretrained(staging)
        if processor is not None:
            processor.save_pretrained(staging)
        report = ConversionReport(
            source=str(source),
            layout=released["model_type"],
            model_type=config.model_type,
            tensors=len(tensors),
            bytes=num_bytes,
            dtype=dtype,
            image_token_id=image_token_id,
            added_rows=added_rows,
            tokenizer_from=tokenizer_from,
            tokenizer_named=named_tokenizer(released),
            image_processor_from=images_from,
            seconds=round(time.perf_counter() - started, 3),
        )
        (staging / REPORT).write_text(report.to_json())
    return report


def _named_tensors(folder: Path) -> dict[str, _Source]:
    """Where each tensor of the converted checkpoint is; only headers are read."""
    tensors: dict[str, _Source] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                try:
                    new = converted_name(name)
                except UserError as error:
                    raise UserError(f"{path}: {error}") from error
                if new is None:
                    continue
                if (other := tensors.get(new)) is not None:
                    raise UserError(f"{name!r} of {path} and {other.name!r} of {other.file.name} are both {new}")
                part = file.get_slice(name)
                dtype = part.get_dtype()
                tensors[new] = _Source(path, name, tuple(part.get_shape()), _DTYPES.get(dtype, dtype))
    return tensors


def _model_class(config: PreTrainedConfig) -> Any:
    student = isinstance(config, CompoDistillStudentConfig)
    return CompoDistillStudentForConditionalGeneration if student else LlavaForConditionalGeneration


def _check_tensors(folder: Path, tensors: dict[str, _Source], config: PreTrainedConfig, added_rows: int) -> None:
    """Every tensor of the model is there in its shape, and no other."""
    with torch.device("meta"):
        model = _model_class(config)(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = {HEAD} if config.tie_word_embeddings else set()
    missing = expected.keys() - tensors.keys() - tied
    unexpected = [tensors[name].name for name in tensors.keys() - expected.keys()]
    if missing or unexpected:
        lacking = f"missing {some(missing)}, unexpected {some(unexpected)}"
        raise UserError(f"{folder} does not hold the model that its config describes: {lacking}")
    for name, source in tensors.items():
        found = (source.shape[0] + added_rows, *source.shape[1:]) if name in (EMBEDDING, HEAD) else source.shape
        if found != expected[name]:
            what = f"{folder}: tensor {source.name!r} of {source.file.name}"
            raise UserError(f"{what} has shape {list(source.shape)}, the config asks for {list(expected[name])}")


def _write_weights(tensors: dict[str, _Source], folder: Path, added_rows: int, progress: Progress) -> int:
    """One file for each released one, and the index that Hugging Face expects of several."""
    files = sorted({source.file for source in tensors.values()})
    task = progress.task("convert", sum(path.stat().st_size for path in files) / 1e6, unit="MB")
    weight_map: dict[str, str] = {}
    num_bytes = 0
    for number, path in enumerate(files):
        target = SINGLE if len(files) == 1 else f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        held: dict[str, Tensor] = {}
        with safe_open(path, framework="pt") as file:
            for name, source in tensors.items():
                if source.file == path:
                    tensor = held[name] = file.get_tensor(source.name)
                    if added_rows and name in (EMBEDDING, HEAD):
                        held[name] = torch.cat([tensor, tensor.new_zeros(added_rows, *tensor.shape[1:])])
        save_file(held, folder / target, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, target)
        num_bytes += sum(tensor.nbytes for tensor in held.values())
        task.update(done=num_bytes / 1e6)
    if len(files) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=1))
    return num_bytes
