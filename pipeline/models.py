"""Loads the model that a name stands for, on the device of this machine."""

from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from pipeline.checkpoints import find_checkpoint
from stages.checkpoints.processors import hide_loading_bars, load_processor
from stages.student.model.loading import load_multimodal


def load_model(model: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A teacher or a student with its processor, on the GPU when there is one.

    Raises:
        UserError: If there is no such checkpoint, or as `load_multimodal`.
    """
    hide_loading_bars()
    folder, device = find_checkpoint(model), default_device()
    loaded: Any = load_multimodal(folder, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return loaded.to(device), load_processor(folder)


def default_device() -> torch.device:
    """The GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
