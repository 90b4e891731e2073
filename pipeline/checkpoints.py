"""Finds the checkpoint that a name stands for: of a training run, a folder, or a hub id."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from stages.checkpoints.processors import hide_loading_bars, load_processor
from stages.checkpoints.quantization import place
from stages.checkpoints.resolve import resolve_checkpoint
from stages.conversations.encoder import ConversationEncoder
from stages.student.model.loading import load_multimodal, multimodal_config
from stages.student.run_folder import RunFolder, StageFolder
from stages.student.stage_config import STAGES

_NO_LIMIT = 2**31


def find_checkpoint(model: str) -> Path:
    """The student of a training run's last stage, otherwise the folder or hub id itself.

    Raises:
        UserError: If no stage of the run has finished, or there is no such checkpoint.
    """
    run, stage = RunFolder(Path(model)), StageFolder(Path(model))
    if run.holds_stages:
        return run.last_student()
    return stage.student if (stage.student / "config.json").is_file() else resolve_checkpoint(model)


def which_student(model: str) -> list[str]:
    """Says which student of a training run `find_checkpoint` takes, and warns if a later stage began; else empty.

    Raises:
        UserError: If no stage has finished.
    """
    run = RunFolder(Path(model))
    if not run.holds_stages:
        return []
    student = run.last_student()
    used = run.finished()[-1]
    begun = [name for name in STAGES[STAGES.index(used) + 1 :] if run.stage(name).is_begun]
    notes = [f"student: {student}, of {used}, the last stage that finished"]
    if begun:
        notes.append(
            f"warning: {' and '.join(begun)} of {model} began and did not finish, so this student lacks what it "
            "trained; run `cdp train-student` again to go on with it"
        )
    return notes


def load_model(model: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A teacher or a student with its processor, on the GPU when there is one.

    A picture and a question go through the processor and its chat template first: weights may take minutes to load.

    Raises:
        UserError: If there is no such checkpoint, its processor or template cannot be used, or as `load_multimodal`.
    """
    hide_loading_bars()
    folder, device = find_checkpoint(model), default_device()
    config, processor = multimodal_config(folder), load_processor(folder)
    encoder = ConversationEncoder(processor, config.image_token_id, max_length=_NO_LIMIT)
    encoder.encode_pair("What is in the picture?", "All is grey.", [Image.new("RGB", (64, 48), "grey")])
    loaded: Any = load_multimodal(folder, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return place(loaded, device), processor


def default_device() -> torch.device:
    """The GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
