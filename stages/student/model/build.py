"""Builds a student: the teacher's frozen vision tower from the target store, a decoder, a new post-connector (TAF)."""

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from stages.attention.capturable_layers import check_sdpa
from stages.checkpoints.configs import load_config, unfit_named
from stages.checkpoints.quantization_scheme import refuse_quantized
from stages.checkpoints.resolve import resolve_student
from stages.checkpoints.weight_files import check_files, some, weight_files
from stages.checkpoints.weights import load_weights
from stages.families.family import Family
from stages.student.model.modeling_any_teacher import AnyTeacherStudentConfig, AnyTeacherStudentForConditionalGeneration
from stages.student.model.modeling_compodistill import (
    CompoDistillStudentConfig,
    CompoDistillStudentForConditionalGeneration,
)
from stages.student.model.rotary_section import position_settings
from stages.student.model.student import Student
from stages.student.student_kind import VISION_PREFIXES, no_decoder, teaching_family
from storage.errors import FingerprintMismatch, UserError


def build_student(
    teacher_folder: Path,
    decoder: str | Path,
    seed: int,
    image_token_id: int | None = None,
    *,
    teacher_positions: bool = True,
) -> Student:
    """A new student in float32 with the teacher's vision tower and projector on a pretrained decoder.

    Args:
        teacher_folder: `teacher/` of a target store: vision tower, projector, configs, processor.
        decoder: Folder, hub id or GGUF file of a causal language model.
        seed: Decides the post-connector's initial weights.
        image_token_id: None takes the teacher's.
        teacher_positions: Whether tokens have the teacher's positions where these are 3D.

    Raises:
        UserError: If no student can have such a teacher, the decoder cannot have its positions, or weights are missing
            in its folder or in the decoder's.
    """
    decoder_folder = resolve_student(decoder)
    teacher_config = load_config(teacher_folder)
    family = teacher_family(teacher_config)
    language_model = load_weights(AutoModelForCausalLM, decoder_folder, dtype=torch.float32)
    _check_head(decoder_folder, language_model)
    positions = {}
    if teacher_positions:
        positions = position_settings(teacher_config, language_model.config, family, str(decoder))
    check_files(teacher_folder)
    tensors = dict(item for path in weight_files(teacher_folder) for item in load_file(path).items())
    # Without numbers first: what the teacher's config asks for may have any size.
    with torch.device("meta"), unfit_named(teacher_folder):
        planned = _untrained(teacher_config, language_model.config, family, image_token_id, positions)
    prefix = VISION_PREFIXES[planned.config.model_type]
    taken = {name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items()}
    shapes = {name: tensor.shape for name, tensor in planned.state_dict().items()}
    vision = tuple(name.replace("model.", prefix, 1) for name in family.vision_prefixes)
    missing = [name for name in shapes if name.startswith(vision) and name not in taken]
    unexpected = [name for name, tensor in taken.items() if shapes.get(name) != tensor.shape]
    if unexpected or missing:
        raise UserError(
            f"{teacher_folder} does not fit this student: unexpected or of another shape {some(unexpected)}, missing "
            f"{some(missing)}; the target store's teacher/ folder is incomplete or of another version"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = _untrained(teacher_config, language_model.config, family, image_token_id, positions)
        student = student.to(torch.float32)
    student.model.language_model.load_state_dict(language_model.model.state_dict())
    student.lm_head.load_state_dict(language_model.lm_head.state_dict())
    student.tie_weights()
    student.load_state_dict(taken, strict=False)
    return student


def teacher_family(teacher: PreTrainedConfig) -> Family:
    """The family of a teacher, by its config in a target store, whose vision tower a student can have.

    Raises:
        UserError: If no student can have it; says why.
    """
    family = teaching_family(teacher.model_type)
    # `Teacher.save_vision` takes the note of it away where only other parts are.
    todo = "give it one of its own (--vision own), or extract with a teacher whose vision tower is not quantized"
    refuse_quantized(teacher, Path(teacher.name_or_path), "a student with the teacher's vision tower", todo)
    return family


def deepstack_levels(teacher: PreTrainedConfig, family: Family) -> int:
    """How many features of earlier vision layers the teacher adds inside its decoder."""
    return len(teacher.vision_config.deepstack_visual_indexes) if family.deepstack else 0


def check_decoder(folder: Path, config: PreTrainedConfig, deepstack: int = 0) -> None:
    """Refuses a model that cannot be a student's decoder, before any weights are loaded.

    `deepstack` is how many of its first layers add features of earlier vision layers to image tokens.

    Raises:
        UserError: If it is no causal language model, none can be built from its config, its parts are not where Llama
            has them, it has no sdpa attention, or its layers cannot be given those features.
    """
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise no_decoder(folder, config.model_type)
    with torch.device("meta"), unfit_named(folder):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    head = getattr(model, "lm_head", None)
    if not isinstance(head, nn.Linear) or head.bias is not None or not hasattr(getattr(model, "model", None), "layers"):
        raise UserError(
            f"{folder} is of type {config.model_type}, which cannot be a student's decoder: expected its layers at "
            "model.layers and a linear lm_head without bias, as Llama and its kin have; name such a model"
        )
    check_sdpa(model)
    if deepstack:
        _check_deepstack(folder, model, deepstack)


def _check_deepstack(folder: Path, model: PreTrainedModel, deepstack: int) -> None:
    """A forward pass without numbers: each of the first layers must be called with the keyword."""
    called: list[bool] = []
    for layer in model.model.layers[:deepstack]:
        layer.register_forward_pre_hook(lambda _, __, kwargs: called.append("deepstack" in kwargs), with_kwargs=True)
    tokens = torch.zeros(1, 4, dtype=torch.long, device="meta")
    with suppress(ValueError, RuntimeError, TypeError):
        model.set_experts_implementation("batched_mm")
        model.model(input_ids=tokens, deepstack=None, use_cache=True)
    if called != [True] * deepstack:
        raise UserError(
            f"{folder} is of type {model.config.model_type}, whose first {deepstack} layers cannot be given the "
            "features of earlier vision layers that this teacher adds to its image tokens (deepstack): it has fewer "
            "layers, or does not hand on what they are called with; name another decoder, or give the student its own "
            "vision tower (--vision own)"
        )


def _check_head(folder: Path, language_model: PreTrainedModel) -> None:
    """Refuses a decoder that changes its logits after the head, for example by a cap: a student does not do it."""
    # Several tokens, because the padding token's embedding may be all zeros.
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        logits = language_model(tokens).logits
        plain = language_model.lm_head(language_model.model(tokens).last_hidden_state)
    if not torch.allclose(logits, plain, rtol=1e-5, atol=1e-6):
        raise UserError(
            f"{folder} is of type {language_model.config.model_type}, which scales or caps the logits that its head "
            "makes; students do not, so they would learn and answer differently: name another decoder"
        )


def _untrained(
    teacher: PreTrainedConfig,
    decoder: PreTrainedConfig,
    family: Family,
    image_token_id: int | None,
    positions: Mapping[str, Any],
) -> CompoDistillStudentForConditionalGeneration | AnyTeacherStudentForConditionalGeneration:
    """The student's model class for this teacher, with random weights."""
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
        deepstack=deepstack_levels(teacher, family),
        tie_word_embeddings=decoder.tie_word_embeddings,
        **positions,
    )
    return AnyTeacherStudentForConditionalGeneration(config)


def student_config(teacher: dict[str, object], text: dict[str, object]) -> CompoDistillStudentConfig:
    """Config of a student: vision tower and projector of a LLaVA 1.5 teacher, decoder of `text`."""
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


def check_vision_tower(student: Path, teacher: Path) -> None:
    """Compares a saved student's vision tower and projector with `teacher/` of a target store, in its own precision.

    Raises:
        FingerprintMismatch: If they differ; names a tensor.
    """
    prefix = VISION_PREFIXES[load_config(student).model_type]
    with ExitStack() as opened:
        check_files(student)
        check_files(teacher)
        files = [opened.enter_context(safe_open(path, "pt")) for path in weight_files(student)]
        file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118, it is no dict
        wanted_files = [opened.enter_context(safe_open(path, "pt")) for path in weight_files(teacher)]
        for wanted, name in [(file, name) for file in wanted_files for name in file.keys()]:  # noqa: SIM118
            own = name.replace("model.", prefix, 1)
            found = file_of[own].get_tensor(own) if own in file_of else None
            if found is None or not torch.equal(found, wanted.get_tensor(name).to(found.dtype)):
                raise FingerprintMismatch(
                    f"{student} does not have the vision tower of the targets' teacher: it has "
                    f"{'no' if found is None else 'another'} {own}. A saved student goes on with targets of the "
                    "teacher that it was built for; one that was exported has its post-connector folded in: name "
                    "STAGE/student of its run folder instead"
                )
