"""The loaded teacher: its model with the capture hook in place, and how it reads a conversation."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, PreTrainedModel

from stages.attention.capture import enable_capture
from stages.checkpoints.quantization import is_packed, place, without_scheme
from stages.checkpoints.weights import load_weights
from stages.conversations.encoder import ConversationEncoder
from stages.teacher.config import TeacherConfig
from stages.teacher.identity import TeacherIdentity, identify_teacher
from storage.samples.image_settings import DEFAULT_IMAGES, ImageConfig


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
        config = self.model.config
        if not is_packed(state):
            # Students are not refused for how the teacher's decoder is stored.
            config = without_scheme(config)
        config.save_pretrained(folder)
        self.identity.processor.save_pretrained(folder)


def load_teacher(settings: TeacherConfig, images: ImageConfig = DEFAULT_IMAGES) -> Teacher:
    """Loads the teacher with its fast attention kernel, on the GPU when there is one; `images` as `identify_teacher`.

    Raises:
        UserError: If the teacher cannot be used, or its weights are not whole.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    identity = identify_teacher(settings, images, on_gpu=device == "cuda")
    model = load_weights(
        AutoModelForImageTextToText,
        identity.folder,
        dtype=identity.dtype,
        trust_remote_code=settings.trust_remote_code,
    )
    place(model, device).eval().requires_grad_(False)
    enable_capture(model)
    return Teacher(identity, model, identity.encoder())
