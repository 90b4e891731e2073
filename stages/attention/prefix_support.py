"""Whether a decoder can go on from recorded keys and values, known from its config before any weights are loaded."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from transformers import AutoModel, PreTrainedConfig

from stages.attention.capture import CAPTURING_SDPA, register_capture
from stages.attention.prefix import PrefixRecord
from stages.checkpoints.configs import unfit_named

_BY_LENGTH: Final = frozenset({"dynamic", "longrope"})
"""Rotary embeddings whose frequencies depend on the length of what is read at once."""
_KNOWN_LAYERS: Final = frozenset({"full_attention", "sliding_attention"})

_FOUND: dict[str, str | None] = {}
"""By config: an extraction asks in each of its processes, a sweep for each of its students."""


def why_no_prefix(decoder: PreTrainedConfig) -> str | None:
    """Why its conversations cannot share what comes before them; None if they can.

    Every layer must have softmax attention over keys and values that reach `stages.attention.prefix`, and see either
    all tokens before it or a window of them; positions must be given from outside.
    """
    key = decoder.to_json_string()
    if key not in _FOUND:
        with unfit_named(f"a {decoder.model_type} decoder"):
            _FOUND[key] = _look(decoder)
    return _FOUND[key]


def _look(decoder: PreTrainedConfig) -> str | None:
    if used := sorted(_BY_LENGTH & set(_rope_types(decoder.to_dict()))):
        return f"its rotary embedding ({', '.join(used)}) depends on how much is read at once"
    types: list[str] = getattr(decoder, "layer_types", None) or []
    if other := sorted(set(types) - _KNOWN_LAYERS):
        return f"it has layers of {', '.join(other)}, whose state is not keys and values of single tokens"
    register_capture()
    record = PrefixRecord([4])
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(decoder, trust_remote_code=False)
            tokens = torch.zeros(1, 4, dtype=torch.long)
        if "position_ids" not in inspect.signature(model.forward).parameters:
            return "it takes no positions"
        model.set_attn_implementation(CAPTURING_SDPA)
        # As in `capturable_layers`: what depends on numbers cannot run without them.
        model.set_experts_implementation("batched_mm")
        model(input_ids=tokens, prefix=record, use_cache=True)
    except (ValueError, RuntimeError, TypeError) as error:
        return f"it does not run as it must ({type(error).__name__})"
    if lacking := sorted(set(range(decoder.num_hidden_layers)) - set(record.states)):
        return f"its layers {lacking} do not show their keys and values"
    window = getattr(decoder, "sliding_window", None)
    expected = {
        layer: window if not types or types[layer] == "sliding_attention" else None
        for layer in range(decoder.num_hidden_layers)
    }
    return None if record.windows == expected else "its layers do not say how far back they see"


def _rope_types(config: Mapping[str, Any]) -> Iterator[str]:
    """All of them, wherever a config of a text model says them."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _rope_types(value)
        elif name in {"rope_type", "type"} and isinstance(value, str):
            yield value
