"""Exports a student to a Hugging Face folder that needs nothing of this project, and checks it against the student."""

import shutil
import time
from collections.abc import Sequence
from inspect import getfile
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.dynamic_module_utils import get_relative_import_files

from stages.checkpoints.config_files import read_config
from stages.checkpoints.image_settings import image_settings
from stages.checkpoints.new_folder import check_new, new_folder
from stages.checkpoints.processors import load_processor
from stages.checkpoints.quantization_scheme import refuse_quantized
from stages.checkpoints.weight_files import weight_files
from stages.conversations.encoder import NO_LIMIT, ConversationEncoder, EncodedConversation
from stages.evaluation.result import SuiteResult
from stages.export.model_card import ExportReport, ModelNames, PostConnector, model_card, read_history
from stages.export.vllm_backend import let_llava_count, why_not_vllm
from stages.student.model.generation import (
    generation_settings,
    grow_vocabulary,
    name_video_half,
    pad_on_the_left,
    vocabulary_tables,
)
from stages.student.model.inputs import model_inputs
from stages.student.model.loading import load_multimodal
from stages.student.model.projector_folding import ModelParts, fold_post_connector, has_post_connector, take_apart
from stages.student.model.student import OWN_CLASSES
from storage.errors import UserError
from storage.progress import SILENT, Progress

REPORT = "export.json"
CARD = "README.md"

Dtype = Literal["bfloat16", "float16", "float32"]

_PROBE = ("What is in the picture?", "A picture of all colours.")
_MOST_BY_ROUNDING = 0.25
"""Share of the largest logit. bfloat16 changed the tests' models by up to 0.08; overflow gives no finite logits."""


def export_student(
    source: Path,
    output: Path,
    *,
    fold: bool = True,
    dtype: Dtype | None = None,
    names: ModelNames = ModelNames(),  # noqa: B008 a frozen value
    evaluations: Sequence[SuiteResult] = (),
    progress: Progress = SILENT,
) -> ExportReport:
    """Writes `output`: weights, config, processor with chat template, generation settings, a model card.

    A student that transformers has no class for gets its modelling file beside it, for `trust_remote_code`. Other
    checkpoints keep their class.

    Args:
        source: A checkpoint folder, such as `RUN/sft/student`.
        output: A folder that does not exist yet, or is empty.
        fold: Whether the post-connector becomes part of the projector, where that is exact.
        dtype: What the weights are rounded to, after folding; None keeps the checkpoint's, float32 of a run.
        names: Of the models that it was made from, for the card.
        evaluations: For the card.
        progress: Counts three steps.

    Raises:
        UserError: If `output` holds something, `source` is no multimodal model, has no chat template or asks to run
            code of its own, or folding or rounding changes the logits too much. Nothing is left behind then.
    """
    started = time.perf_counter()
    check_new(output)
    task = progress.task(f"export {output.name}", total=3, unit="steps")
    task.update(note="loading")
    refuse_quantized(read_config(source / "config.json"), source, "an export")
    student, processor = load_multimodal(source), _served_processor(source)
    vision_type = getattr(student.config, "teacher_config", student.config).model_type
    probe = ConversationEncoder(processor, student.config.image_token_id, NO_LIMIT).encode_pair(*_PROBE, [_picture()])
    parts, post_connector = _folded(student, fold=fold)
    grown, added_ids = grow_vocabulary(parts, vocabulary_tables(student), processor.tokenizer)
    generation = generation_settings(student, processor.tokenizer, probe, added_ids)
    task.update(done=1, note="saving")
    with new_folder(output) as staging:
        # The student itself where nothing changed: transformers saves some families under other names than it holds.
        changed = post_connector == "folded" or bool(added_ids)
        model = grown.build() if changed else student
        trained, stored = student.dtype, student.dtype if dtype is None else getattr(torch, dtype)
        num_parameters, expected_TV, unrounded_TV = _save_rounded(model, stored, generation, staging, student, probe)
        del student, parts, grown, model
        processor.save_pretrained(staging)
        name_video_half(vision_type, staging)
        task.update(done=2, note="comparing")
        exported = load_multimodal(staging)
        stored = exported.dtype  # before its logits are computed in float32
        found_TV = _logits(exported, probe)
        report = ExportReport(
            source="/".join(source.absolute().parts[-3:]),  # the whole path is private
            model_class=type(exported).__name__,
            custom_code=Path(getfile(type(exported))).name if isinstance(exported, OWN_CLASSES) else None,
            post_connector=post_connector,
            dtype=str(stored).removeprefix("torch."),
            trained_dtype=str(trained).removeprefix("torch."),
            parameters=num_parameters,
            bytes=sum(path.stat().st_size for path in weight_files(staging)),
            image_token_id=exported.config.image_token_id,
            added_rows=len(added_ids),
            images=image_settings(exported.config),
            end_token_ids=generation.eos_token_id,
            never_generated=tuple(sorted(set(generation.suppress_tokens))),
            why_not_vllm=why_not_vllm(exported, processor),
            logit_error=_difference(found_TV, expected_TV),
            rounding_error=_check_logits(found_TV, expected_TV, unrounded_TV, trained, stored),
            logit_scale=float(expected_TV.abs().max()),
            seconds=round(time.perf_counter() - started, 3),
        )
        (staging / REPORT).write_text(report.to_json())
        card = model_card(output.name, report, read_history(source), names, evaluations)
        (staging / CARD).write_text(card, encoding="utf-8")
    task.update(done=3, note="")
    return report


def _served_processor(source: Path) -> ProcessorMixin:
    """The processor as generation and servers need it."""
    processor = load_processor(source)
    pad_on_the_left(processor.tokenizer)
    let_llava_count(processor)
    return processor


def _folded(student: PreTrainedModel, *, fold: bool) -> tuple[ModelParts, PostConnector]:
    """The student's parts, its post-connector folded if wanted and exact, and what became of it."""
    parts = take_apart(student)
    if not has_post_connector(parts):
        return parts, "none"
    parts = fold_post_connector(parts) if fold else parts
    return parts, "kept" if has_post_connector(parts) else "folded"


def _save_rounded(
    model: PreTrainedModel,
    dtype: torch.dtype,
    generation: GenerationConfig,
    folder: Path,
    student: PreTrainedModel,
    probe: EncodedConversation,
) -> tuple[int, Tensor, Tensor | None]:
    """Saves the model with its weights in `dtype`.

    Returns its number of parameters, the student's logits, and the model's before it was rounded; None if it was not.
    """
    if dtype == student.dtype:
        num_parameters = _save(model, generation, folder)
        # After saving, because it turns the student to float32, and the model may be the student.
        return num_parameters, _logits(student, probe), None
    expected_TV = _logits(student, probe)
    unrounded_TV = expected_TV if model is student else _logits(model, probe)
    return _save(_rounded(model, dtype), generation, folder), expected_TV, unrounded_TV


def _save(model: PreTrainedModel, generation: GenerationConfig, folder: Path) -> int:
    """Writes weights, configs and, for a student of this project, its modelling file; returns how many parameters."""
    model.generation_config = generation
    if isinstance(model, OWN_CLASSES):
        code = Path(getfile(type(model)))
        for file in (code, *map(Path, get_relative_import_files(code))):
            shutil.copyfile(file, folder / file.name)
        # vLLM makes the model without a head itself, by `AutoModel`.
        parts = {"AutoConfig": model.config, "AutoModel": model.model, "AutoModelForImageTextToText": model}
        model.config.auto_map = {auto: f"{code.stem}.{type(part).__name__}" for auto, part in parts.items()}
    for part in (model.config, model.config.get_text_config()):
        # A path of this machine.
        part._name_or_path = ""
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _rounded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its weights in `dtype`, in place, and configs that say so."""

    def note(config: PreTrainedConfig) -> None:
        config.dtype = dtype
        for name in config.sub_configs:
            if (part := getattr(config, name, None)) is not None:
                note(part)

    note(model.config)
    return model.to(dtype)


def _picture() -> Image.Image:
    """A picture with all colours and without edges."""
    return Image.merge("RGB", [Image.linear_gradient("L").rotate(turn).resize((96, 64)) for turn in (0, 90, 180)])


def _logits(model: PreTrainedModel, probe: EncodedConversation) -> Tensor:
    """`[T, V]` in float32; weights of another dtype are turned to it."""
    model = model.float()
    with torch.inference_mode():
        logits_TV: Tensor = model(**model_inputs(model, [probe])).logits[0]
    return logits_TV


def _difference(found_TV: Tensor, expected_TV: Tensor) -> float:
    """The largest difference over the ids that both have."""
    return float((found_TV[:, : expected_TV.shape[1]] - expected_TV).abs().max())


def _check_logits(
    found_TV: Tensor, expected_TV: Tensor, unrounded_TV: Tensor | None, trained: torch.dtype, stored: torch.dtype
) -> float:
    """Refuses logits that folding or rounding changed too much; returns what rounding changed."""
    unrounded_TV = found_TV if unrounded_TV is None else unrounded_TV
    # Far more than rounding the folded weights once can do, far less than a mistake in them would do.
    share = torch.finfo(trained).eps ** 0.5
    _check(unrounded_TV, expected_TV, share, "the export's logits", "Export with --no-fold")
    what = f"the logits of weights rounded to {stored}"
    return _check(found_TV, unrounded_TV, _MOST_BY_ROUNDING, what, "Export with another --dtype")


def _check(found_TV: Tensor, expected_TV: Tensor, share: float, what: str, advice: str) -> float:
    """The largest difference; refused if it is more than this share of the largest logit."""
    difference, scale = _difference(found_TV, expected_TV), float(expected_TV.abs().max())
    if not difference <= share * scale:
        raise UserError(
            f"{what} differ from the student's by {difference:.3g} where {share * scale:.3g} are expected at most "
            f"(largest logit {scale:.3g}); nothing was written. {advice}"
        )
    return difference
