"""Head-averaged attention maps over image tokens, taken while the model runs its fast attention kernel.

A model is switched to the attention function `CAPTURING_SDPA` once after loading; a forward pass that carries
`capture=AttentionCapture(...)` then also yields the maps of the layers it names. Everything else (other layers,
the vision tower, passes without `capture`) is the stock scaled-dot-product attention, bit for bit.

Shape letters: B rows of the batch, H query heads, T tokens, K keys up to the last image token, N image tokens (of
the row with the most), d head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

CAPTURING_SDPA = "cdp_sdpa"
CAPTURE_VERSION = 1  # part of the fingerprint: raised when the same model would give other maps


@dataclass
class AttentionCapture:
    """What to capture in one forward pass, and what was captured.

    Attributes:
        layers: decoder layers to capture, counted from 0.
        positions: for each row of the batch the positions of its image tokens in the padded row, ascending,
            `[n]` integers; empty for a row without an image or whose maps are not wanted.
        maps: filled by the forward pass: layer -> `[B, N, N]` float32, rows are queries; zero beyond a row's own n.
    """

    layers: frozenset[int]
    positions: Sequence[Tensor]
    maps: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        width = max(map(len, self.positions), default=0)
        self.positions_BN = torch.zeros(len(self.positions), width, dtype=torch.long)
        for row, positions in enumerate(self.positions):
            self.positions_BN[row, : len(positions)] = positions
        self.valid_BN = torch.arange(width) < torch.tensor([len(p) for p in self.positions])[:, None]
        self.num_keys = int(self.positions_BN.max()) + 1 if width else 0

    def to(self, device: torch.device) -> "AttentionCapture":
        """Moves the index tensors, so that the forward pass copies nothing."""
        self.positions_BN = self.positions_BN.to(device)
        self.valid_BN = self.valid_BN.to(device)
        return self


def enable_capture(model: PreTrainedModel) -> None:
    """Switches the language model of `model` to the capturing attention; the vision tower keeps plain sdpa.

    Not saved to config.json: call it after every load, in every process.
    """
    AttentionInterface.register(CAPTURING_SDPA, _sdpa_with_capture)
    # Under the same name, or the mask arrives as None even with padding: no error, wrong logits.
    AttentionMaskInterface.register(CAPTURING_SDPA, sdpa_mask)
    model.set_attn_implementation({"text_config": CAPTURING_SDPA, "vision_config": "sdpa"})


def _sdpa_with_capture(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    capture: AttentionCapture | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    layer = getattr(module, "layer_idx", None)
    if capture is not None and capture.num_keys and layer in capture.layers:
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        maps_BNN = image_block_maps(query, key, attention_mask, capture, scaling)
        # Activation checkpointing runs a layer twice and must do the same work twice, but the maps that the loss
        # already holds are those of the first run.
        capture.maps.setdefault(layer, maps_BNN)
    return output


def image_block_maps(
    query_BHTd: Tensor,
    key_BGTd: Tensor,
    attention_mask: Tensor | None,
    capture: AttentionCapture,
    scaling: float,
) -> Tensor:
    """Attention probabilities after softmax over all keys, averaged over heads, image rows and columns only.

    Works head by head, so that no `[H, T, T]` tensor exists; with gradients on, a head's probabilities are
    computed again in the backward pass instead of being kept.

    Args:
        query_BHTd: queries with rotary positions applied.
        key_BGTd: keys, one per key-value head (G divides H).
        attention_mask: None for plain causal attention, else bool (True = may attend) or additive, `[B|1, 1, T, T]`.
        capture: which rows and columns.
        scaling: factor on the scores.

    Returns:
        `[B, N, N]` float32.

    Source: METHOD, "VAT".
    """
    positions_BN = capture.positions_BN.to(query_BHTd.device)
    valid_BN = capture.valid_BN.to(query_BHTd.device)
    batch, num_heads, _, width = query_BHTd.shape
    # No image token attends past the last one of its sample: causal models by order, Gemma 3 because an image block
    # attends within itself. So later keys have probability zero and are left out.
    num_keys = capture.num_keys
    bias_BNK = _score_bias(attention_mask, positions_BN, num_keys, query_BHTd.dtype)
    index_BNd = positions_BN[:, :, None].expand(-1, -1, width)
    columns_BNN = positions_BN[:, None, :].expand(-1, positions_BN.shape[1], -1)
    group = num_heads // key_BGTd.shape[1]

    def one_head(query_BTd: Tensor, key_BTd: Tensor) -> Tensor:
        rows_BNd = query_BTd.gather(1, index_BNd)
        scores_BNK = rows_BNd @ key_BTd[:, :num_keys].transpose(1, 2) * scaling + bias_BNK
        return scores_BNK.softmax(-1, dtype=torch.float32).gather(2, columns_BNN)

    needs_grad = torch.is_grad_enabled() and (query_BHTd.requires_grad or key_BGTd.requires_grad)
    total_BNN = torch.zeros(
        batch, positions_BN.shape[1], positions_BN.shape[1], dtype=torch.float32, device=query_BHTd.device
    )
    for head in range(num_heads):
        query_BTd, key_BTd = query_BHTd[:, head], key_BGTd[:, head // group]
        if needs_grad:
            total_BNN = total_BNN + checkpoint(one_head, query_BTd, key_BTd, use_reentrant=False)
        else:
            total_BNN += one_head(query_BTd, key_BTd)
    return total_BNN * (valid_BN[:, :, None] & valid_BN[:, None, :]) / num_heads


def _score_bias(attention_mask: Tensor | None, positions_BN: Tensor, num_keys: int, dtype: torch.dtype) -> Tensor:
    """`[B, N, K]` to add to the scores: 0 where a query may attend, the lowest float where not."""
    lowest = torch.finfo(dtype).min
    if attention_mask is None:
        keys_K = torch.arange(num_keys, device=positions_BN.device)
        allowed_BNK = keys_K <= positions_BN[:, :, None]
        return torch.zeros(allowed_BNK.shape, dtype=dtype, device=positions_BN.device).masked_fill(~allowed_BNK, lowest)
    mask_BTK = attention_mask[:, 0, :, :num_keys].expand(positions_BN.shape[0], -1, -1)
    mask_BNK = mask_BTK.gather(1, positions_BN[:, :, None].expand(-1, -1, num_keys))
    if mask_BNK.dtype == torch.bool:
        return torch.zeros(mask_BNK.shape, dtype=dtype, device=mask_BNK.device).masked_fill(~mask_BNK, lowest)
    return mask_BNK.to(dtype)
