"""Which parameters of a student learn in a stage; LoRA is added before it and merged after it."""

import logging
import re
import warnings
from collections.abc import Iterable

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from stages.student.config import LoraSettings, StageConfig
from stages.student.model.student import Student, decoder_of, has_own_vision, projector_parameters
from storage.errors import UserError

logger = logging.getLogger(__name__)


def prepare_for_stage(
    student: Student, stage: StageConfig, lora: LoraSettings, seed: int, *, own_projector: bool = True
) -> PeftModel | None:
    """Freezes what the stage does not train; adds LoRA to `student` in place when the stage trains that.

    `requires_grad` is not part of a checkpoint, so this runs after every load. LoRA adapts every linear layer of the
    decoder's layers; a warning names the matrices that belong to no linear layer.

    Args:
        student: As loaded.
        stage: Says what learns.
        lora: Settings for stages that train LoRA.
        seed: Decides the initial weights of LoRA.
        own_projector: Whether the projector of a student with its own vision tower learns.

    Returns:
        The peft wrapper that can merge LoRA's updates, None without LoRA.

    Raises:
        UserError: If nothing learns.
    """
    wrapper = None
    student.requires_grad_(False)
    if stage.trains == "lora":
        _warn_of_what_lora_leaves(student)
        settings = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            # One pattern, because peft shortens a long list of names to their endings.
            target_modules="|".join(map(re.escape, decoder_linears(student))),
            bias="none",
        )
        with torch.random.fork_rng(), warnings.catch_warnings():
            # peft uses an old name of transformers; the user can do nothing about it.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            torch.manual_seed(seed)
            wrapper = get_peft_model(student, settings)
    elif stage.trains == "full":
        decoder_of(student).requires_grad_(True)
        student.lm_head.requires_grad_(True)
    if own_projector or not has_own_vision(student):
        for parameter in projector_parameters(student):
            parameter.requires_grad_(True)
    elif stage.trains == "post_connector":
        raise UserError(
            "nothing learns in a stage that trains the projector alone while train.projector is frozen; "
            "leave that stage out, or let it train lora or full"
        )
    return wrapper


def decoder_linears(student: Student) -> list[str]:
    """Names of the linear layers that LoRA adapts, in the model's order."""
    inside = {id(module) for module in _layers(student).modules() if isinstance(module, nn.Linear)}
    return [name for name, module in student.named_modules() if id(module) in inside]


def beyond_lora(student: Student) -> dict[str, nn.Parameter]:
    """Matrices of the decoder's layers outside all linear layers, such as experts in one tensor, by name."""
    layers = _layers(student)
    adapted = {id(p) for module in layers.modules() if isinstance(module, nn.Linear) for p in module.parameters()}
    inside = {id(p) for p in layers.parameters() if p.dim() > 1} - adapted
    return {name: parameter for name, parameter in student.named_parameters() if id(parameter) in inside}


def _warn_of_what_lora_leaves(student: Student) -> None:
    if beyond := beyond_lora(student):
        logger.warning(
            "LoRA adapts linear layers; %d matrices of the decoder's layers (%.0f %% of their parameters), such as "
            "%s, belong to none and stay frozen. They learn in a stage with trains: full",
            len(beyond),
            100 * _count(beyond.values()) / _count(_layers(student).parameters()),
            next(iter(beyond)),
        )


def _layers(student: Student) -> nn.Module:
    return decoder_of(student).get_submodule("layers")


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def keep_frozen_in(student: Student, dtype: torch.dtype) -> None:
    """Converts frozen parameters; trained ones stay float32, because small updates need it."""
    for parameter in student.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def merge_lora(wrapper: PeftModel | None, student: Student) -> Student:
    """The student as a plain model: LoRA updates added to the weights they adapt."""
    if wrapper is None:
        return student
    merged: Student = wrapper.merge_and_unload()
    return merged
