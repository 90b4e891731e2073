"""Where the parts of a student are, whether it has the teacher's eyes or its own."""

from torch import nn

from stages.families import FAMILIES
from stages.student.model.build import Student


def has_own_vision(student: Student) -> bool:
    """Whether it is a model of the library with a tower and an adapter of its own."""
    return student.config.model_type in FAMILIES


def projector_parameters(student: Student) -> list[nn.Parameter]:
    """What carries image features to the decoder and may learn in every stage.

    The post-connector of a student with the teacher's eyes, the adapter of one with its own.
    """
    family = FAMILIES.get(student.config.model_type)
    prefixes = ("model.post_connector.",) if family is None else family.projector_prefixes
    return [parameter for name, parameter in student.named_parameters() if name.startswith(prefixes)]


def decoder_of(student: Student) -> nn.Module:
    """The causal language model without its head."""
    model = student.model
    decoder: nn.Module = model.language_model if hasattr(model, "language_model") else model.text_model
    return decoder
