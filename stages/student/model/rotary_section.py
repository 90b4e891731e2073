"""Which rotary frequencies of a student's decoder turn by time, height and width, as those of its teacher do."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from stages.checkpoints.configs import unfit_named
from stages.families.family import Family
from storage.errors import UserError

_BY_LENGTH: Final = frozenset({"dynamic", "longrope"})
_REMEDY: Final = "name another decoder, or set train.positions to ordinary"


def position_settings(
    teacher: PreTrainedConfig, decoder: PreTrainedConfig, family: Family, name: str
) -> dict[str, Any]:
    """What the student's config says of positions, by the name of its field; empty where the teacher's are ordinary.

    `name` is the decoder's, for errors.

    Raises:
        UserError: If the decoder cannot have the teacher's positions, or the teacher's config says too little of them.
    """
    if family.rotary_axes is None:
        return {}
    section = (teacher.get_text_config().rope_parameters or {}).get("mrope_section")
    if section is None:
        raise UserError(
            f"the config of the teacher ({teacher.model_type}) has no mrope_section, which says how its 3D positions "
            "are encoded; extract from a checkpoint with one, or set train.positions to ordinary"
        )
    scaled = scaled_section(section, _num_frequencies(decoder, name))
    if 0 in scaled:
        found = f"{name} has {sum(scaled)} rotary frequencies"
        raise UserError(f"{found}, too few for the teacher's three axes ({section}); {_REMEDY}")
    return {"mrope_section": scaled, "mrope_interleaved": family.rotary_axes == "interleaved"}


def scaled_section(section: Sequence[int], num_frequencies: int) -> list[int]:
    """Shares of `num_frequencies` in the proportions of `section`.

    Where they are no whole numbers they are rounded down, and what is left goes to the largest remainders, one each;
    of equal ones to time before height before width.
    """
    total = sum(section)
    shares = [count * num_frequencies // total for count in section]
    remainders = [count * num_frequencies % total for count in section]
    for axis in sorted(range(len(shares)), key=lambda axis: -remainders[axis])[: num_frequencies - sum(shares)]:
        shares[axis] += 1
    return shares


def _num_frequencies(decoder: PreTrainedConfig, name: str) -> int:
    """Of its rotary embedding, if positions can be given to its layers from outside."""
    kind = f"{name} is of type {decoder.model_type}, whose decoder cannot have the teacher's 3D positions"
    rope = getattr(decoder, "rope_parameters", None) or {}
    if (scaling := rope.get("rope_type")) in _BY_LENGTH:
        raise UserError(f"{kind}: its rotary frequencies depend on the length ({scaling}); {_REMEDY}")
    with torch.device("meta"), unfit_named(name):
        model = AutoModel.from_config(decoder, trust_remote_code=False)
    cos_sin_d = _at_position_1(model) if _layers_take_rotary(model) else None
    if cos_sin_d is None:
        raise UserError(f"{kind}: its layers do not all take one rotary embedding of positions; {_REMEDY}")
    halves = [part_d.chunk(2) for part_d in cos_sin_d]
    if not all(torch.equal(*pair) for pair in halves):
        raise UserError(f"{kind}: its rotary embedding is not laid out in two halves, as Llama's is; {_REMEDY}")
    return len(halves[0][0])


def _at_position_1(model: PreTrainedModel) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines `[d]`, with numbers, because on which channels a frequency lies shows in them alone."""
    with suppress(AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        cos, sin = type(model.rotary_emb)(model.config)(torch.zeros(1), torch.ones(1, 1))
        return cos[0, 0], sin[0, 0]
    return None


def _layers_take_rotary(model: PreTrainedModel) -> bool:
    """A forward pass without numbers: layers must be called with the keyword, and with cosines and sines."""
    called: list[bool] = []

    def see(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        own = kwargs.get("position_embeddings")
        called.append("rotary_3d" in kwargs and isinstance(own, tuple) and len(own) == 2)

    for layer in model.layers:
        layer.register_forward_pre_hook(see, with_kwargs=True)
    tokens = torch.zeros(1, 4, dtype=torch.long, device="meta")
    with suppress(ValueError, RuntimeError, TypeError):
        model.set_experts_implementation("batched_mm")
        model(input_ids=tokens, rotary_3d=None, use_cache=True)
    return bool(called) and all(called)
