"""What a student or any multimodal model is called with for encoded conversations."""

import inspect
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel

from stages.conversations.encoder import EncodedConversation
from stages.families.batch import batch_inputs, move_inputs
from stages.families.family import Family
from stages.families.registry import FAMILIES, LLAVA, family_of
from stages.student.model.modeling_any_teacher import AnyTeacherStudentForConditionalGeneration
from stages.student.model.student import OWN_CLASSES


def model_inputs(
    model: PreTrainedModel, conversations: Sequence[EncodedConversation], *, pad_left: bool = False
) -> dict[str, Tensor]:
    """The inputs of `model` on its device, pixels in its dtype; tokens padded right, or left as generation needs it.

    Raises:
        UserError: If a conversation has an input that the model's family does not name.
    """
    family = family_of_model(model, conversations)
    token_ids = [conversation.token_ids for conversation in conversations]
    pixels = [conversation.pixel_inputs for conversation in conversations]
    inputs = batch_inputs(family, model.config.image_token_id, token_ids, pixels, pad_left=pad_left)
    return move_inputs(inputs, model.device, model.dtype)


def family_of_model(model: PreTrainedModel, conversations: Sequence[EncodedConversation] = ()) -> Family:
    """The family whose inputs `model` takes.

    A model of transformers that no family describes gets what its processor made of `conversations`, joined as it is.
    """
    if isinstance(model, AnyTeacherStudentForConditionalGeneration):
        # The student's decoder is not told where images are.
        return replace(family_of(model.config.teacher_config.model_type), modality_input=None)
    if isinstance(model, OWN_CLASSES):
        return LLAVA
    if model.config.model_type in FAMILIES:
        return FAMILIES[model.config.model_type]
    accepted = inspect.signature(model.base_model.forward).parameters
    return Family(
        model_types=(model.config.model_type,),
        vision_prefixes=(),
        projector_prefixes=(),
        causal_image_tokens=True,
        pixel_inputs={name: "cat" for conversation in conversations for name in conversation.pixel_inputs},
        modality_input=next((name for name in ("mm_token_type_ids", "token_type_ids") if name in accepted), None),
    )
