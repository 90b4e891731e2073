"""The loaded teacher: its model with the capture hook in place, and how it reads a conversation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, PreTrainedModel

from stages.attention.capture import enable_capture
from stages.checkpoints.quantization import is_packed, place, without_scheme
from stages.checkpoints.weights import load_weights
from stages.conversations.encoder import ConversationEncoder
from stages.teacher.config import TeacherConfig, ranks_of
from stages.teacher.identity import TeacherIdentity, identify_teacher
from stages.teacher.placement import check_fits, check_gpus, execution_device, gpus_of, left_over_refused, over_gpus
from stages.teacher.rank_messages import Pass
from stages.teacher.ranks import Ranks
from stages.teacher.tensor_split import split_settings, without_split
from storage.samples.image_settings import DEFAULT_IMAGES, ImageConfig


@dataclass(eq=False)
class Teacher:
    """A loaded teacher; `load_teacher` makes one."""

    identity: TeacherIdentity
    model: PreTrainedModel
    """Of a teacher whose layers are split over several processes the part of this one; `on_all_ranks` may load it
    anew."""
    encoder: ConversationEncoder
    ranks: Ranks | None = None
    """The other processes of such a teacher, in rank 0."""

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
        config = without_split(self.model.config)
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
    `from_pretrained` takes. With `settings.parallel` tensor each layer is split over `num_gpus` processes, this and
    others that it starts, with a GPU each where there are any.

    Raises:
        UserError: If the teacher cannot be used, its weights are not whole, or they do not fit into so many GPUs.
        RankLost: If another process of it ends.
    """
    on_gpu = torch.cuda.is_available()
    num_ranks = ranks_of(settings, num_gpus)
    if num_ranks > 1:
        if on_gpu:
            check_gpus(num_ranks)
        identity = identify_teacher(settings, images, on_gpu=on_gpu, num_ranks=num_ranks)
        ranks = Ranks(identity, lambda: _loaded(identity, split_settings(num_ranks)))
        return Teacher(identity, ranks.start(), identity.encoder(), ranks)
    placement = over_gpus(num_gpus) if device_map is None else {"device_map": dict(device_map)}
    identity = identify_teacher(settings, images, on_gpu=on_gpu)
    with left_over_refused(num_gpus):
        model = _loaded(identity, placement)
    if not placement:
        place(model, "cuda" if on_gpu else "cpu")
    elif device_map is None:
        check_fits(model, num_gpus)
    return Teacher(identity, model, identity.encoder())


def load_rank(settings: TeacherConfig, images: ImageConfig, num_ranks: int) -> Teacher:
    """Loads the part of a rank that is not rank 0; its weights, which rank 0 has digested, are not read for that.

    Raises:
        UserError: As `load_teacher`.
    """
    on_gpu = torch.cuda.is_available()
    identity = identify_teacher(settings, images, on_gpu=on_gpu, with_weights=False, num_ranks=num_ranks)
    return Teacher(identity, _loaded(identity, split_settings(num_ranks)), identity.encoder())


def _loaded(identity: TeacherIdentity, placement: Mapping[str, Any]) -> PreTrainedModel:
    model = load_weights(
        AutoModelForImageTextToText,
        identity.folder,
        dtype=identity.dtype,
        trust_remote_code=identity.settings.trust_remote_code,
        **placement,
    )
    model.eval().requires_grad_(False)
    enable_capture(model)
    return model


_P = ParamSpec("_P")
_R = TypeVar("_R")


def on_all_ranks(
    pass_of: Callable[_P, Pass],
) -> Callable[[Callable[Concatenate[Teacher, _P], _R]], Callable[Concatenate[Teacher, _P], _R]]:
    """Makes all processes of a teacher run a function of it, of which `pass_of` makes what the others are told.

    Where the last pass ended badly all of them are started again first, and load their weights.
    """

    def decorate(run: Callable[Concatenate[Teacher, _P], _R]) -> Callable[Concatenate[Teacher, _P], _R]:
        @wraps(run)
        def run_together(teacher: Teacher, *args: _P.args, **kwargs: _P.kwargs) -> _R:
            if teacher.ranks is None:
                return run(teacher, *args, **kwargs)
            if not teacher.ranks.are_running:
                vars(teacher).pop("model", None)  # not beside the new one
                teacher.model = teacher.ranks.start()
            with teacher.ranks.together(pass_of(*args, **kwargs)):
                return run(teacher, *args, **kwargs)

        return run_together  # type: ignore[return-value]

    return decorate
