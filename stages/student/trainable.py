"""Which parameters of a student learn in a stage, and folding LoRA away afterwards."""

import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from stages.student.build import Student
from stages.student.config import LoraSettings, StageConfig
from stages.student.parts import connector_parameters, decoder_of, has_own_eyes
from storage.errors import UserError

_DECODER_LINEARS = r".*(language_model|text_model)\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def prepare_for_stage(
    student: Student, stage: StageConfig, lora: LoraSettings, seed: int, *, own_adapter: bool = True
) -> PeftModel | None:
    """Freezes all but what the stage trains; puts LoRA into `student` in place when it trains that.

    `requires_grad` is not part of a checkpoint, so this runs after every load; new weights follow from `seed`.

    Args:
        student: freshly loaded.
        stage: says what learns.
        lora: used by stages that train LoRA.
        seed: of the updates' initial weights.
        own_adapter: whether the adapter of a student with its own eyes learns.

    Returns:
        The peft wrapper that can merge the updates, None without LoRA.
    """
    wrapper = None
    student.requires_grad_(False)
    if stage.trains == "lora":
        settings = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=_DECODER_LINEARS,
            bias="none",
        )
        with torch.random.fork_rng(), warnings.catch_warnings():
            # peft asks transformers by a name that it renamed; nothing for the user to do.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            torch.manual_seed(seed)
            wrapper = get_peft_model(student, settings)
    elif stage.trains == "full":
        decoder_of(student).requires_grad_(True)
        student.lm_head.requires_grad_(True)
    if own_adapter or not has_own_eyes(student):
        for parameter in connector_parameters(student):
            parameter.requires_grad_(True)
    elif stage.trains == "post_connector":
        raise UserError(
            "nothing learns in a stage that trains the projector alone while train.own_adapter is frozen; "
            "leave that stage out, or let it train lora or full"
        )
    return wrapper


def keep_frozen_in(student: Student, dtype: torch.dtype) -> None:
    """Converts the parameters that do not learn; those that do keep float32, as small updates need it."""
    for parameter in student.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def merge_lora(wrapper: PeftModel | None, student: Student) -> Student:
    """The student as a plain model: LoRA updates added to the weights they adapt."""
    if wrapper is None:
        return student
    merged: Student = wrapper.merge_and_unload()
    return merged
