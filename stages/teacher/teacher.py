"""The loaded teacher: its model with the capture hook in place, and how it reads a conversation."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, PreTrainedModel

from stages.attention.capture import enable_capture
from stages.checkpoints.weights import load_weights
from stages.conversations.encoder import ConversationEncoder
from stages.teacher.config import TeacherConfig
from stages.teacher.identity import TeacherIdentity, identify_teacher


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher; `load_teacher` makes one."""

    identity: TeacherIdentity
    model: PreTrainedModel
    encoder: ConversationEncoder

    def save_vision(self, folder: Path) -> None:
        """Writes all a student needs of the teacher: vision tower, projector, configs and processor."""
        folder.mkdir(parents=True, exist_ok=True)
        prefixes = self.identity.family.vision_prefixes
        state = {name: t for name, t in self.model.state_dict().items() if name.startswith(prefixes)}
        save_file({name: t.contiguous() for name, t in state.items()}, folder / "model.safetensors")
        self.model.config.save_pretrained(folder)
        self.identity.processor.save_pretrained(folder)


def load_teacher(settings: TeacherConfig) -> Teacher:
    """Loads the teacher with its fast attention kernel, on the GPU when there is one.

    Raises:
        UserError: If the teacher cannot be used, or its weights are not whole.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    identity = identify_teacher(settings, on_gpu=device == "cuda")
    model = load_weights(
        AutoModelForImageTextToText,
        identity.folder,
        dtype=identity.dtype,
        trust_remote_code=settings.trust_remote_code,
    )
    model.to(device).eval().requires_grad_(False)
    enable_capture(model)
    encoder = ConversationEncoder(identity.processor, model.config.image_token_id, settings.max_length)
    return Teacher(identity, model, encoder)
