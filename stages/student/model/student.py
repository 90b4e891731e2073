"""What a student is: its classes, and where its parts are."""

from typing import TypeAlias

from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from stages.families.registry import FAMILIES
from stages.student.model.modeling_any_teacher import AnyTeacherStudentForConditionalGeneration
from stages.student.model.modeling_compodistill import (
    CompoDistillStudentForConditionalGeneration,
)

OWN_CLASSES = (CompoDistillStudentForConditionalGeneration, AnyTeacherStudentForConditionalGeneration)
"""Students with the teacher's vision tower; transformers has no class for them."""

Student: TypeAlias = (
    CompoDistillStudentForConditionalGeneration | AnyTeacherStudentForConditionalGeneration | PreTrainedModel
)
"""One of the first two with the teacher's vision tower, a class of transformers with its own."""


def register_students() -> None:
    """Makes the Auto classes of transformers know students; safe to call again."""
    for model_class in OWN_CLASSES:
        config_class = model_class.config_class
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForImageTextToText.register(config_class, model_class, exist_ok=True)


def projector_parameters(student: Student) -> list[nn.Parameter]:
    """What carries image features to the decoder, and may learn in every stage: post-connector or own projector."""
    family = FAMILIES.get(student.config.model_type)
    own = ("model.post_connector.", "model.deepstack_connectors.")
    prefixes = own if family is None else family.projector_prefixes
    return [parameter for name, parameter in student.named_parameters() if name.startswith(prefixes)]


def decoder_of(student: Student) -> nn.Module:
    """The causal language model without its head."""
    model = student.model
    decoder: nn.Module = model.language_model if hasattr(model, "language_model") else model.text_model
    return decoder
