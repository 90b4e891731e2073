"""Which checkpoint can become a student of which teacher, known from both configs without a library."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.checkpoints.config_files import CONFIG, read_config
from stages.checkpoints.processor_files import TOKENIZER, check_processor_files
from stages.checkpoints.quantization_scheme import refuse_quantized
from stages.families.family import Family
from stages.families.registry import FAMILIES, family_of
from storage.errors import UserError

VISION_PREFIXES = {"compodistill_student": "model.", "compodistill_any_teacher_student": "model.eyes."}
"""Model types of students with the teacher's vision tower -> what `model.` in the names of its tensors becomes."""

_ENCODERS = ("ForMaskedLM", "ForImageClassification")
"""How class names end of models that are encoders alone, though the library may have decoders of their type."""


def is_student(folder: Path) -> bool:
    """Whether a checkpoint is a student with a teacher's vision tower, not a bare decoder or another model."""
    return read_config(folder / CONFIG).get("model_type") in VISION_PREFIXES


def check_student(folder: Path, teacher_type: str, *, own_vision: bool) -> dict[str, Any]:
    """The config of a checkpoint that is to be trained, as far as its files alone say that it can be.

    Raises:
        UserError: If it is quantized, of another kind than asked for, or files of its tokenizer or processor are
            missing.
    """
    config = read_config(folder / CONFIG)
    refuse_quantized(config, folder, "a student")
    model_type = config.get("model_type", "")
    vision_family(folder, model_type, teacher_type, own_vision=own_vision)
    if not own_vision and model_type not in VISION_PREFIXES and _has_encoder(config):
        raise no_decoder(folder, model_type)
    if own_vision:
        check_processor_files(folder)
    if not (folder / TOKENIZER).is_file():
        raise without_tokenizer(folder)
    return config


def vision_family(folder: Path, model_type: str, teacher_type: str, *, own_vision: bool) -> Family:
    """Family of the vision tower of a student of that type.

    Raises:
        UserError: If the checkpoint is not of the kind that `own_vision` says, or no student can have such a teacher.
    """
    if not own_vision:
        if model_type in FAMILIES and not FAMILIES[model_type].decoder_alone:
            raise UserError(
                f"{folder} is a whole multimodal model ({model_type}); give --vision own to keep its vision tower "
                "and projector, or name a causal language model as the student's decoder"
            )
        return teaching_family(teacher_type)
    if model_type not in FAMILIES:
        raise UserError(
            f"{folder} is of type {model_type}, which has no vision tower of its own; name a multimodal "
            f"checkpoint ({', '.join(sorted(FAMILIES))}), or give it the teacher's vision tower (--vision teacher)"
        )
    for role, name in (("student", model_type), ("teacher", teacher_type)):
        if (reason := family_of(name).why_not_with_own_vision()) is not None:
            wrong = f"a student with its own vision tower cannot be trained with a {role} of type {name}"
            raise UserError(f"{wrong}: {reason}")
    return FAMILIES[model_type]


def teaching_family(model_type: str) -> Family:
    """The family of a teacher whose vision tower a student can have.

    Raises:
        UserError: If no student can have it; says why.
    """
    family = family_of(model_type)
    if (reason := family.why_no_student()) is not None:
        able = sorted(name for name, known in FAMILIES.items() if known.why_no_student() is None)
        raise UserError(
            f"no student can be built for a teacher of type {model_type}: {reason}. Its targets can be extracted; "
            f"students can be built for {', '.join(able)}"
        )
    return family


def no_decoder(folder: Path, model_type: str) -> UserError:
    """The refusal of a model that is no causal language model."""
    return UserError(
        f"{folder} is of type {model_type}, which is no causal language model; name one such as Qwen or Llama as the "
        "student's decoder"
    )


def without_tokenizer(folder: Path) -> UserError:
    """The refusal of a checkpoint without a fast tokenizer's file."""
    return UserError(
        f"{folder} has no {TOKENIZER}, so nothing says whether its token ids are the teacher's; save the fast "
        "tokenizer of that model into it"
    )


def refuse_without_images(folder: Path) -> None:
    """Refuses a decoder alone where a model that takes images is needed.

    Raises:
        UserError: If it is one.
    """
    config = read_config(folder / CONFIG)
    if config.get("model_type") in {*FAMILIES, *VISION_PREFIXES} or _mentions_images(config):
        return
    classes = _classes(config)
    if classes and all(name.endswith("ForCausalLM") for name in classes):
        raise takes_no_images(folder, config.get("model_type", ""))


def takes_no_images(folder: Path, model_type: str) -> UserError:
    """The refusal of a model of text alone."""
    return UserError(f"{folder} is of type {model_type}, which takes no images; give a multimodal model")


def _mentions_images(config: Mapping[str, Any]) -> bool:
    return any(word in key for key in config for word in ("vis", "image", "mm_"))


def _has_encoder(config: Mapping[str, Any]) -> bool:
    """Whether it is an encoder, alone or with a decoder behind it. Of other kinds the library knows more."""
    classes = _classes(config)
    return config.get("is_encoder_decoder") is True or (bool(classes) and all(c.endswith(_ENCODERS) for c in classes))


def _classes(config: Mapping[str, Any]) -> list[str]:
    """Names of the classes that the checkpoint was saved from."""
    found = config.get("architectures")
    return [str(name) for name in found] if isinstance(found, list) else []
