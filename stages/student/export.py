"""Exports a student: a Hugging Face folder that needs nothing of this project, checked against the student itself."""

import inspect
import shutil
import time
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from stages.checkpoints import load_processor
from stages.conversations import ConversationEncoder, EncodedConversation
from stages.evaluation.report import EvaluationReport
from stages.new_folder import check_new, new_folder
from stages.student.card import ExportReport, ModelNames, model_card, read_history
from stages.student.folding import fold_post_connector, has_post_connector, take_apart
from stages.student.loading import OWN_CLASSES, load_multimodal, model_inputs
from stages.student.serving import (
    generation_settings,
    grow_vocabulary,
    name_video_half,
    pad_on_the_left,
    vocabulary_tables,
)
from storage.errors import UserError

REPORT = "export.json"
CARD = "README.md"

_PROBE = ("What is in the picture?", "A picture of all colours.")
_NO_LIMIT = 2**31


def export_student(
    source: Path,
    output: Path,
    *,
    fold: bool = True,
    names: ModelNames = ModelNames(),  # noqa: B008 a frozen value
    evaluation: EvaluationReport | None = None,
) -> ExportReport:
    """Writes `output`: weights, config, processor with chat template, generation settings, a model card.

    A student that transformers has no class for gets its modelling file beside it, for `trust_remote_code`. A
    checkpoint of a class that transformers has stays of that class.

    Args:
        source: a checkpoint folder, such as `RUN/sft/student`.
        output: a folder that does not exist yet, or is empty.
        fold: whether the post-connector becomes part of the adapter, where that is exact.
        names: of the models that it was made from, for the card.
        evaluation: goes into the card.

    Raises:
        UserError: `output` holds something, `source` is no multimodal model, has no chat template or asks to run code
            of its own, or the export computes something else than the student. Nothing is left behind then.
    """
    started = time.perf_counter()
    check_new(output)
    student, processor = load_multimodal(source), load_processor(source)
    pad_on_the_left(processor.tokenizer)
    eyes = getattr(student.config, "teacher_config", student.config).model_type
    probe = ConversationEncoder(processor, student.config.image_token_id, _NO_LIMIT).encode_pair(*_PROBE, [_picture()])
    parts = whole = take_apart(student)
    had_post_connector = has_post_connector(whole)
    if fold and had_post_connector:
        parts = fold_post_connector(parts)
    folded = had_post_connector and not has_post_connector(parts)
    parts, added_ids = grow_vocabulary(parts, vocabulary_tables(student), processor.tokenizer)
    generation = generation_settings(student, processor.tokenizer, probe, added_ids)

    with new_folder(output) as staging:
        # Itself where nothing changed: the library writes some families under other names than it holds.
        num_parameters = _save(student if parts is whole else parts.build(), generation, staging)
        expected_TV = _logits(student, probe)
        del student, parts, whole
        processor.save_pretrained(staging)
        name_video_half(eyes, staging)
        exported = load_multimodal(staging)
        stored = exported.dtype
        error, scale = _difference(_logits(exported, probe), expected_TV, stored)
        report = ExportReport(
            # Not the whole path, which is nobody else's business.
            source="/".join(source.absolute().parts[-3:]),
            model_class=type(exported).__name__,
            custom_code=_code_of(type(exported)).name if isinstance(exported, OWN_CLASSES) else None,
            post_connector="folded" if folded else "kept" if had_post_connector else "none",
            dtype=str(stored).removeprefix("torch."),
            parameters=num_parameters,
            bytes=sum(path.stat().st_size for path in staging.glob("*.safetensors")),
            image_token_id=exported.config.image_token_id,
            added_rows=len(added_ids),
            end_token_ids=generation.eos_token_id,
            logit_error=error,
            logit_scale=scale,
            seconds=round(time.perf_counter() - started, 3),
        )
        (staging / REPORT).write_text(report.model_dump_json(indent=1))
        card = model_card(output.name, report, read_history(source), names, evaluation)
        (staging / CARD).write_text(card, encoding="utf-8")
    return report


def _save(model: PreTrainedModel, generation: GenerationConfig, folder: Path) -> int:
    """Writes weights, configs and, for a student of this project, its modelling file; returns how many parameters."""
    model.generation_config = generation
    if isinstance(model, OWN_CLASSES):
        code = _code_of(type(model))
        shutil.copyfile(code, folder / code.name)
        names = {"AutoConfig": type(model.config).__name__, "AutoModelForImageTextToText": type(model).__name__}
        model.config.auto_map = {auto: f"{code.stem}.{name}" for auto, name in names.items()}
    for part in (model.config, model.config.get_text_config()):
        # Where it once lay on this machine.
        part._name_or_path = ""
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _code_of(model_class: type) -> Path:
    return Path(inspect.getfile(model_class))


def _picture() -> Image.Image:
    """All colours, with edges nowhere."""
    return Image.merge("RGB", [Image.linear_gradient("L").rotate(turn).resize((96, 64)) for turn in (0, 90, 180)])


def _logits(model: PreTrainedModel, probe: EncodedConversation) -> Tensor:
    """`[T, V]` in float32, which the model is turned to if its weights are in another dtype."""
    model = model.float()
    with torch.inference_mode():
        logits_TV: Tensor = model(**model_inputs(model, probe)).logits[0]
    return logits_TV


def _difference(found_TV: Tensor, expected_TV: Tensor, stored: torch.dtype) -> tuple[float, float]:
    """Largest difference over the ids that both have, and the largest logit."""
    difference = float((found_TV[:, : expected_TV.shape[1]] - expected_TV).abs().max())
    scale = float(expected_TV.abs().max())
    # Far more than one rounding of the folded weights can do, far less than a mistake in them would.
    bound = torch.finfo(stored).eps ** 0.5 * scale
    if not difference <= bound:
        raise UserError(
            f"the export's logits differ from the student's by {difference:.3g} where {bound:.3g} are expected at most "
            f"(largest logit {scale:.3g}); nothing was written. Export with --no-fold"
        )
    return difference, scale
