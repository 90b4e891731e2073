"""Which layers of a decoder give attention maps at all, known from its config before any weights are loaded."""

from collections.abc import Iterable

import torch
from transformers import AutoModel, PreTrainedConfig

from stages.attention.capture import CAPTURING_SDPA, AttentionCapture, register_capture
from stages.checkpoints.configs import unfit_named
from storage.errors import UserError

_FOUND: dict[str, frozenset[int] | None] = {}
"""By config: a run asks for each of its stages, a sweep for each of its students."""


def layers_with_maps(decoder: PreTrainedConfig) -> frozenset[int] | None:
    """The layers, counted from 0, whose attention `AttentionCapture` sees: one forward pass without numbers.

    Linear attention and state space layers have no maps; in some families layers do not hand `capture` on. None for a
    family whose forward pass depends on numbers, or that the library does not know.

    Raises:
        UserError: If it cannot run with sdpa, beside which maps are captured, or no model can be built from its config.
    """
    key = decoder.to_json_string()
    if key not in _FOUND:
        with unfit_named(f"a {decoder.model_type} decoder"):
            _FOUND[key] = _look(decoder)
    return _FOUND[key]


def _look(decoder: PreTrainedConfig) -> frozenset[int] | None:
    register_capture()
    capture = AttentionCapture(frozenset(range(decoder.num_hidden_layers)), [torch.arange(2)])
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(decoder, trust_remote_code=False)
            tokens = torch.zeros(1, 4, dtype=torch.long)
    except (ValueError, RuntimeError):
        return None
    check_sdpa(model)
    try:
        model.set_attn_implementation(CAPTURING_SDPA)
        # The default of mixtures of experts looks at how many tokens each got.
        model.set_experts_implementation("batched_mm")
        # With a cache, without which the library looks at positions for several samples in one row.
        model(input_ids=tokens, capture=capture, use_cache=True)
    except (ValueError, RuntimeError):
        return None
    return frozenset(capture.maps)


def check_sdpa(model: object) -> None:
    """Refuses a model that transformers runs without sdpa, with a UserError."""
    if not getattr(model, "_supports_sdpa", True):
        raise UserError(
            f"{type(model).__name__} has no sdpa attention in transformers, beside which attention maps are captured "
            "and students are trained; choose another decoder"
        )


def check_maps(what: str, decoder: PreTrainedConfig, wanted: Iterable[int], remedy: str) -> None:
    """Refuses layers that give no attention maps; `what` is whose they are, `remedy` what to do about it.

    Raises:
        UserError: If some wanted ones give none; the message names them and those that do.
    """
    able = layers_with_maps(decoder)
    if able is not None:
        refuse_without_maps(what, wanted, able, remedy)


def refuse_without_maps(what: str, wanted: Iterable[int], able: Iterable[int], remedy: str) -> None:
    """As `check_maps`, where the layers that give maps are known."""
    able = sorted(able)
    if lacking := sorted(set(wanted) - set(able)):
        those = f"only its layers {able} do" if able else "none of its layers does"
        raise UserError(
            f"layers {lacking} of {what} give no attention map ({those}): they have no softmax attention, or do not "
            f"hand on what captures it; {remedy}"
        )
