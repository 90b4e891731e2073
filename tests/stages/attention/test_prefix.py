"""Attention over a recorded prefix and what follows it, against attention over the whole."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig

from stages.attention.prefix import PrefixContinuation, PrefixRecord
from stages.attention.prefix_support import why_no_prefix

LENGTHS, PADDED = (5, 8, 3), 8
ROWS = (2, 0, 0, 1)
"""Of each row of the batch, its prefix."""


def whole(query_HTd: Tensor, key_gTd: Tensor, value_gTd: Tensor, window: int | None) -> Tensor:
    """Textbook attention of one sequence."""
    at = torch.arange(query_HTd.shape[1])
    back_TT = at[:, None] - at
    mask_TT = (back_TT >= 0) & (back_TT < (window or len(at)))
    return scaled_dot_product_attention(query_HTd, key_gTd, value_gTd, attn_mask=mask_TT, enable_gqa=True)


@pytest.mark.parametrize("window", [None, 4, 1])
def test_attention_behind_a_prefix_is_that_of_the_whole(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    record = PrefixRecord(LENGTHS)
    states = [torch.randn(3, 2, PADDED, 6, generator=generator, dtype=torch.float64) for _ in range(2)]
    for state in states:
        for row, length in enumerate(LENGTHS):
            state[row, :, length:] = torch.nan
    assert record.at_layer(7, states[0], states[1], None, window)[:2] == (states[0], states[1])
    own = [torch.randn(4, heads, 5, 6, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]
    before = PrefixContinuation(record, ROWS)
    key, value, mask = before.at_layer(7, own[1], own[2], None, window)
    found = scaled_dot_product_attention(own[0], key, value, attn_mask=mask, enable_gqa=True)
    for number, row in enumerate(ROWS):
        length = LENGTHS[row]
        # Queries of the prefix do not matter.
        query = torch.cat([torch.zeros(4, length, 6, dtype=torch.float64), own[0][number]], 1)
        keys, values = (
            torch.cat([state[row, :, :length], part[number]], 1) for state, part in zip(states, own[1:], strict=True)
        )
        torch.testing.assert_close(found[number], whole(query, keys, values, window)[:, length:])


def test_what_lies_behind_a_prefix_in_its_padded_row_is_kept_as_zeros() -> None:
    record = PrefixRecord([1])
    state = torch.full((1, 1, 3, 2), torch.inf)
    record.at_layer(0, state, state, None, None)
    assert [part[0, 0].isinf().all(1).tolist() for part in record.states[0]] == [[True, False, False]] * 2
    assert not any(part[0, 0, 1:].any() for part in record.states[0])


@pytest.mark.parametrize(
    ("model_type", "changes", "why"),
    [
        ("llama", {}, None),
        ("mistral", {"sliding_window": 8}, None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, None),
        ("gemma3_text", {"sliding_window": 8}, None),
        ("qwen2_5_vl_text", {}, None),
        ("qwen3_next", {}, "layers of linear_attention, whose state is not keys and values"),
        ("llama4_text", {}, "layers of chunked_attention"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "(dynamic)"),
        ("bloom", {}, "it takes no positions"),
        ("falcon", {}, "do not show their keys and values"),
    ],
)
def test_which_decoders_can_go_on_from_a_prefix_is_known_from_their_config(
    model_type: str, changes: dict[str, object], why: str | None
) -> None:
    found = why_no_prefix(AutoConfig.for_model(model_type, num_hidden_layers=4, **changes))
    assert found is None if why is None else (found is not None and why in found)
