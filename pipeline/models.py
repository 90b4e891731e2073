"""Loads the model that a name stands for, on the device of this machine."""

import os
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from pipeline.checkpoints import find_checkpoint
from stages.checkpoints.processors import hide_loading_bars, load_processor
from stages.checkpoints.quantization import place
from stages.conversations.encoder import NO_LIMIT, ConversationEncoder
from stages.student.model.loading import load_multimodal, multimodal_config


def load_model(model: str, device: torch.device | None = None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A teacher or a student with its processor, on a device; by default on the GPU when there is one.

    A picture and a question go through the processor and its chat template first: weights may take minutes to load.

    Raises:
        UserError: If there is no such checkpoint, its processor or template cannot be used, or as `load_multimodal`.
    """
    hide_loading_bars()
    folder, device = find_checkpoint(model), device or default_device()
    config, processor = multimodal_config(folder), load_processor(folder)
    encoder = ConversationEncoder(processor, config.image_token_id, max_length=NO_LIMIT)
    encoder.encode_pair("What is in the picture?", "All is grey.", [Image.new("RGB", (64, 48), "grey")])
    loaded: Any = load_multimodal(folder, computing_dtype())
    return place(loaded, device), processor


def default_device() -> torch.device:
    """The GPU of this process, if there is one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def computing_dtype() -> torch.dtype:
    """Of the weights that are loaded: bfloat16 on a GPU, else float32."""
    return torch.bfloat16 if default_device().type == "cuda" else torch.float32
