"""Loads students and other multimodal checkpoints."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from stages.checkpoints.configs import load_config
from stages.checkpoints.weights import load_weights
from stages.student.model.student import Student, register_students
from stages.student.student_kind import is_student, takes_no_images


def load_student(folder: Path, dtype: "torch.dtype | str" = torch.float32) -> Student:
    """A student that an earlier stage saved, or a multimodal checkpoint that keeps its own vision tower.

    Raises:
        UserError: As `load_weights`.
    """
    register_students()
    return load_weights(AutoModelForImageTextToText, folder, nothing_else=is_student(folder), dtype=dtype)


def load_multimodal(folder: Path, dtype: "torch.dtype | str" = "auto") -> PreTrainedModel:
    """A student or any multimodal model in evaluation mode; no code of the folder is run.

    Raises:
        UserError: If it takes no images, needs code of its own, or lacks weights.
    """
    multimodal_config(folder)
    return load_student(folder, dtype).eval()


def multimodal_config(folder: Path) -> PreTrainedConfig:
    """The config of a student or any multimodal model.

    Raises:
        UserError: If it takes no images or needs code of its own.
    """
    register_students()
    config = load_config(folder)
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise takes_no_images(folder, config.model_type)
    return config


def check_weights(folder: Path, *, bare: bool) -> None:
    """Reads the headers of a checkpoint's files to see whether it can be loaded; a `bare` one is a decoder alone.

    Raises:
        UserError: As `load_weights`.
    """
    auto_class = AutoModelForCausalLM if bare else AutoModelForImageTextToText
    load_weights(auto_class, folder, nothing_else=is_student(folder), device_map="meta")
