"""The loaded teacher: its model with the capture hook in place, and how it reads a conversation."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, PreTrainedModel

from stages.attention.capture import enable_capture
from stages.checkpoints.quantization import is_packed, place, without_scheme
from stages.checkpoints.weights import load_weights
from stages.conversations.encoder import ConversationEncoder
from stages.teacher.config import TeacherConfig
from stages.teacher.identity import TeacherIdentity, identify_teacher
from stages.teacher.placement import check_fits, execution_device, gpus_of, left_over_refused, over_gpus
from storage.samples.image_settings import DEFAULT_IMAGES, ImageConfig


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher; `load_teacher` makes one."""

    identity: TeacherIdentity
    model: PreTrainedModel
    encoder: ConversationEncoder

    @cached_property
    def device(self) -> torch.device:
        """Where its inputs go: that of the token embeddings, whose layers may be spread over more."""
        return execution_device(self.model.get_input_embeddings())

    @cached_property
    def gpus(self) -> tuple[torch.device, ...]:
        """The GPUs that hold its weights; none on a CPU."""
        return gpus_of(self.model)

    def synchronize(self) -> None:
        """Waits until its GPUs have done what the calling thread gave them, and not for other threads."""
        for gpu in self.gpus:
            torch.cuda.current_stream(gpu).synchronize()

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


def load_teacher(
    settings: TeacherConfig,
    images: ImageConfig = DEFAULT_IMAGES,
    num_gpus: int = 1,
    device_map: Mapping[str, Any] | None = None,
) -> Teacher:
    """Loads the teacher with its fast attention kernel, on the GPU when there is one; `images` as `identify_teacher`.

    Its layers are spread over `num_gpus` of the GPUs that this process sees, or as `device_map` says, which
    `from_pretrained` takes.

    Raises:
        UserError: If the teacher cannot be used, its weights are not whole, or they do not fit into so many GPUs.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    placement = over_gpus(num_gpus) if device_map is None else {"device_map": dict(device_map)}
    identity = identify_teacher(settings, images, on_gpu=device == "cuda")
    with left_over_refused(num_gpus):
        model = load_weights(
            AutoModelForImageTextToText,
            identity.folder,
            dtype=identity.dtype,
            trust_remote_code=settings.trust_remote_code,
            **placement,
        )
    if not placement:
        place(model, device)
    elif device_map is None:
        check_fits(model, num_gpus)
    model.eval().requires_grad_(False)
    enable_capture(model)
    return Teacher(identity, model, identity.encoder())
