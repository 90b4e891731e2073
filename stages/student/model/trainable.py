"""Which parameters of a student learn in a stage; LoRA is added before it and merged after it."""

import logging
import re
import warnings
from collections.abc import Iterable

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from stages.student.model.student import OWN_CLASSES, Student, decoder_of, projector_parameters
from stages.student.stage_config import LoraSettings, StageConfig
from storage.errors import UserError

logger = logging.getLogger(__name__)


def prepare_for_stage(
    student: Student, stage: StageConfig, lora: LoraSettings, seed: int, *, own_projector: bool = True
) -> PeftModel | None:
    """Freezes what the stage does not train; adds LoRA to `student` in place when the stage trains that.

    `requires_grad` is not part of a checkpoint, so this runs after every load. LoRA adapts every linear layer of the
    decoder's layers; a warning names the matrices that belong to no linear layer. LoRA's initial weights follow from
    `seed`. The projector of a student with its own vision tower learns if `own_projector`.

    Returns:
        The peft wrapper that can merge LoRA's updates, None without LoRA.

    Raises:
        UserError: If nothing learns.
    """
    wrapper = None
    student.requires_grad_(False)
    if stage.trains == "lora":
        layers = decoder_of(student).get_submodule("layers")
        linears = {id(module): module for module in layers.modules() if isinstance(module, nn.Linear)}
        _warn_of_what_lora_leaves(student, layers, linears.values())
        settings = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            # One pattern, because peft shortens a long list of names to their endings.
            target_modules="|".join(re.escape(name) for name, part in student.named_modules() if id(part) in linears),
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
    if own_projector or isinstance(student, OWN_CLASSES):
        for parameter in projector_parameters(student):
            parameter.requires_grad_(True)
    elif stage.trains == "post_connector":
        raise UserError(
            "nothing learns in a stage that trains the projector alone while train.projector is frozen; "
            "leave that stage out, or let it train lora or full"
        )
    return wrapper


def _warn_of_what_lora_leaves(student: Student, layers: nn.Module, linears: Iterable[nn.Module]) -> None:
    """Names matrices of the decoder's layers outside all linear layers, such as experts in one tensor."""
    adapted = {id(parameter) for module in linears for parameter in module.parameters()}
    beyond = {id(p): p.numel() for p in layers.parameters() if p.dim() > 1 and id(p) not in adapted}
    if beyond:
        logger.warning(
            "LoRA adapts linear layers; %d matrices of the decoder's layers (%.0f %% of their parameters), such as "
            "%s, belong to none and stay frozen. They learn in a stage with trains: full",
            len(beyond),
            100 * sum(beyond.values()) / sum(p.numel() for p in layers.parameters()),
            next(name for name, parameter in student.named_parameters() if id(parameter) in beyond),
        )


def keep_frozen_in(student: Student, dtype: torch.dtype) -> None:
    """Converts frozen parameters; trained ones stay float32, because small updates need it."""
    for parameter in student.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
