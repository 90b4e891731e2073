"""Loads any multimodal checkpoint, a student or a model of transformers, and says what it is called with."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from stages.checkpoints import load_config, refuse_code
from stages.conversations.encoder import EncodedConversation
from stages.families import family_of, llava
from stages.families.batch import batch_inputs, to_model
from stages.families.family import Family
from stages.student.model.build import is_student, register_students
from stages.student.model.modeling_any_teacher import AnyTeacherStudentForConditionalGeneration
from stages.student.model.modeling_compodistill import CompoDistillStudentForConditionalGeneration
from stages.weights import load_weights
from storage.errors import UserError

OWN_CLASSES = (CompoDistillStudentForConditionalGeneration, AnyTeacherStudentForConditionalGeneration)
"""Students that transformers has no class for."""


def load_multimodal(folder: Path, dtype: "torch.dtype | str" = "auto") -> PreTrainedModel:
    """The model in evaluation mode; no code of the folder is run.

    Raises:
        UserError: it takes no images, needs code of its own, or lacks weights.
    """
    register_students()
    refuse_code(folder)
    config = load_config(folder)
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise UserError(f"{folder} is of type {config.model_type}, which takes no images; give a multimodal model")
    model = load_weights(
        AutoModelForImageTextToText, folder, nothing_else=is_student(folder), dtype=dtype, trust_remote_code=False
    )
    return model.eval()


def model_inputs(model: PreTrainedModel, encoded: EncodedConversation) -> dict[str, Tensor]:
    """What `model` is called with for one conversation, on its device, pixels in its dtype."""
    inputs = batch_inputs(_family(model), model.config.image_token_id, [encoded.token_ids], [encoded.pixel_inputs])
    return to_model(inputs, model)


def _family(model: PreTrainedModel) -> Family:
    if isinstance(model, AnyTeacherStudentForConditionalGeneration):
        # The student's decoder is not told where images are.
        return replace(family_of(model.config.teacher_config.model_type), modality_input=None)
    return llava.FAMILY if isinstance(model, OWN_CLASSES) else family_of(model.config.model_type)
