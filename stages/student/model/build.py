"""Building a student: the teacher's frozen eyes from the target store, its own decoder, a new post-connector (TAF)."""

import json
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from stages.captured_layers import check_sdpa
from stages.checkpoints import load_config, refuse_code, resolve_checkpoint
from stages.families import FAMILIES, family_of
from stages.families.family import Family
from stages.student.model import modeling_any_teacher, modeling_compodistill
from stages.student.model.modeling_any_teacher import AnyTeacherStudentConfig, AnyTeacherStudentForConditionalGeneration
from stages.student.model.modeling_compodistill import (
    CompoDistillStudentConfig,
    CompoDistillStudentForConditionalGeneration,
)
from stages.weights import load_weights
from storage.errors import UserError

Student: TypeAlias = (
    CompoDistillStudentForConditionalGeneration | AnyTeacherStudentForConditionalGeneration | PreTrainedModel
)
"""With the teacher's eyes one of the first two; with its own, a class of the library."""

_PREFIXES = {CompoDistillStudentConfig.model_type: "model.", AnyTeacherStudentConfig.model_type: "model.eyes."}
"""Where the teacher's image side is: in the model for teachers of any family, it is a part of its own."""


def build_student(
    teacher_folder: Path,
    decoder: str | Path,
    seed: int,
    dtype: torch.dtype = torch.float32,
    image_token_id: int | None = None,
) -> Student:
    """A new student with the teacher's eyes on a pretrained decoder; `reading.py` says whether their tokens agree.

    Args:
        teacher_folder: `teacher/` of a target store: vision tower, adapter, configs, processor.
        decoder: folder or hub id of a causal language model.
        seed: of the post-connector's initial weights.
        dtype: of the parameters.
        image_token_id: the placeholder's id; None takes the teacher's.

    Raises:
        UserError: the teacher's family takes no student, or its folder or the decoder's is not whole.
    """
    decoder_folder = resolve_checkpoint(decoder)
    for folder in (teacher_folder, decoder_folder):
        refuse_code(folder)
    teacher_config = load_config(teacher_folder)
    family = able_family(teacher_config.model_type)
    language_model = load_weights(AutoModelForCausalLM, decoder_folder, dtype=dtype, trust_remote_code=False)
    _check_head(decoder_folder, language_model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = _untrained(teacher_config, language_model.config, family, image_token_id).to(dtype)
    student.model.language_model.load_state_dict(language_model.model.state_dict())
    student.lm_head.load_state_dict(language_model.lm_head.state_dict())
    student.tie_weights()
    place = _PREFIXES[student.config.model_type]
    seen = {
        name.replace("model.", place, 1): tensor
        for name, tensor in load_file(teacher_folder / "model.safetensors").items()
    }
    _, unexpected = student.load_state_dict(seen, strict=False)
    prefixes = tuple(prefix.replace("model.", place, 1) for prefix in family.vision_prefixes)
    missing = [name for name in student.state_dict() if name.startswith(prefixes) and name not in seen]
    if unexpected or missing:
        raise UserError(
            f"{teacher_folder} does not fit this student: unexpected {unexpected[:3]}, missing {missing[:3]}; "
            "the target store's teacher/ folder is incomplete or of another version"
        )
    return student


def able_family(teacher_type: str) -> Family:
    """The family of a teacher whose eyes a student can have.

    Raises:
        UserError: no student can have them; says why.
    """
    family = family_of(teacher_type)
    if (reason := family.why_no_student()) is not None:
        able = sorted(name for name, known in FAMILIES.items() if known.why_no_student() is None)
        raise UserError(
            f"no student can be built for a teacher of type {teacher_type}: {reason}. Its targets can be extracted; "
            f"students can be built for {', '.join(able)}"
        )
    return family


def check_decoder(folder: Path, config: PreTrainedConfig) -> None:
    """Refuses what cannot be a student's decoder, before any weights are loaded.

    Raises:
        UserError: no causal language model, or one whose parts are not where those of Llama and its kin are, or that
            has no sdpa attention.
    """
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(
            f"{folder} is of type {config.model_type}, which is no causal language model; name one such as Qwen or "
            "Llama as the student's decoder"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = getattr(model, "lm_head", None)
    if not isinstance(head, nn.Linear) or head.bias is not None or not hasattr(getattr(model, "model", None), "layers"):
        raise UserError(
            f"{folder} is of type {config.model_type}, which cannot be a student's decoder: expected its layers at "
            "model.layers and a linear lm_head without bias, as Llama and its kin have; name such a model"
        )
    check_sdpa(model)


def _check_head(folder: Path, language_model: PreTrainedModel) -> None:
    """The student has decoder and head, but nothing that a family may do to logits besides, such as a cap."""
    # Several, since that of padding may have an embedding of zeros.
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        logits = language_model(tokens).logits
        plain = language_model.lm_head(language_model.model(tokens).last_hidden_state)
    if not torch.allclose(logits, plain, rtol=1e-5, atol=1e-6):
        raise UserError(
            f"{folder} is of type {language_model.config.model_type}, which scales or caps the logits that its head "
            "makes; students do not, so they would learn and answer differently: name another decoder"
        )


def load_student(folder: Path, dtype: torch.dtype = torch.float32) -> Student:
    """A student saved by an earlier stage, or a multimodal checkpoint that keeps its own eyes.

    Raises:
        UserError: as `load_weights`.
    """
    register_students()
    return load_weights(AutoModelForImageTextToText, folder, nothing_else=is_student(folder), dtype=dtype)


def check_weights(folder: Path, *, bare: bool) -> None:
    """Whether a checkpoint can be loaded, from the headers of its files.

    Args:
        folder: the checkpoint.
        bare: whether it is a decoder alone, rather than a student or a multimodal model.

    Raises:
        UserError: as `load_weights`.
    """
    auto_class = AutoModelForCausalLM if bare else AutoModelForImageTextToText
    load_weights(auto_class, folder, nothing_else=is_student(folder), device_map="meta")


def _untrained(
    teacher: PreTrainedConfig, decoder: PreTrainedConfig, family: Family, image_token_id: int | None = None
) -> CompoDistillStudentForConditionalGeneration | AnyTeacherStudentForConditionalGeneration:
    image_id = teacher.image_token_id if image_token_id is None else image_token_id
    if "llava" in family.model_types:
        return CompoDistillStudentForConditionalGeneration(
            student_config(teacher.to_dict() | {"image_token_index": image_id}, decoder.to_dict())
        )
    config = AnyTeacherStudentConfig(
        teacher_config=teacher,
        text_config=decoder,
        image_token_id=image_id,
        pixel_inputs=list(family.pixel_inputs),
        tie_word_embeddings=decoder.tie_word_embeddings,
    )
    return AnyTeacherStudentForConditionalGeneration(config)


def register_students() -> None:
    """Makes the Auto classes of transformers know students; safe to call again."""
    modeling_compodistill.register()
    modeling_any_teacher.register()


def student_vision_prefix(folder: Path) -> str:
    """Before the names of a student's tensors that are `model.` in the teacher; `folder` is the student's."""
    return _PREFIXES[json.loads((folder / "config.json").read_text())["model_type"]]


def is_student(folder: Path) -> bool:
    """Whether a checkpoint is a student with a teacher's eyes, rather than a bare decoder or a model of the library."""
    config = json.loads((folder / "config.json").read_text())
    return config.get("model_type") in _PREFIXES


def student_config(teacher: dict[str, object], text: dict[str, object]) -> CompoDistillStudentConfig:
    """The teacher's image side, the decoder's text side."""
    text_config = AutoConfig.for_model(**text)
    shared = (
        "image_token_index",
        "image_seq_length",
        "projector_hidden_act",
        "vision_feature_select_strategy",
        "vision_feature_layer",
        "multimodal_projector_bias",
    )
    teacher_text = teacher["text_config"]
    assert isinstance(teacher_text, dict)
    return CompoDistillStudentConfig(
        vision_config=teacher["vision_config"],
        text_config=text_config,
        adapter_hidden_size=teacher_text["hidden_size"],
        tie_word_embeddings=text_config.tie_word_embeddings,
        **{name: teacher[name] for name in shared if name in teacher},
    )
