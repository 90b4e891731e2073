"""Head-averaged attention maps over image tokens, taken while the model runs its fast attention kernel.

A model is switched to the attention function `CAPTURING_SDPA` once after loading; a forward pass that carries
`capture=AttentionCapture(...)` then also yields the maps of the layers it names. Everything else (other layers,
the vision tower, passes without `capture`) is the stock scaled-dot-product attention, bit for bit.

Shape letters: B rows of the batch, H query heads, g key-value heads, T tokens, k keys up to the last image token,
q queries of a block, N image tokens (of the row with the most), d head width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from stages.attention.prefix import PrefixContinuation, PrefixRecord
from stages.attention.text_rows import AnswerQueries, answer_attention, score_bias, text_rows
from storage.codecs.token_cells import TokenCells, pooled_maps, pooled_rows

CAPTURING_SDPA = "cdp_sdpa"
CAPTURE_VERSION = 3  # part of the fingerprint: raised when the same model would give other maps

BLOCK_ROWS = 128  # image queries at a time; later keys than the last of them are left out
CPU_BLOCK_ENTRIES = 2**18  # scores that exist at a time: 1 MiB stays in a core's cache
GPU_BLOCK_ENTRIES = 2**26


class AttentionCapture:
    """What to capture in one forward pass, and what was captured.

    No dataclass: FSDP2 looks for tensors in dataclasses that a layer is called with, and hands it a copy with others in
    their place, so that maps would be lost.

    Attributes:
        layers: decoder layers to capture, counted from 0.
        positions: for each row of the batch the positions of its image tokens in the padded row, ascending,
            `[n]` integers; empty for a row without an image or whose maps are not wanted.
        text_positions: for each row the positions of text tokens whose attention to its image tokens is wanted too;
            None where none is.
        maps: filled by the forward pass: layer -> `[B, N, N]` float32, rows are queries; zero beyond a row's own n.
        text_maps: filled if `text_positions` are given: layer -> for each row of the batch `[U, n]`, see `text_rows`;
            no gradient flows to them.
        answers: for each row the answers whose mean attention to image tokens is wanted, which may be others than those
            of `positions`; None where it is of none.
        cells: for each row the cell of each of its image tokens (`token_cells.py`); what is captured is then of cells
            in place of image tokens. None where it is of tokens.
        answer_maps: filled if `answers` are given: layer -> for each row of the batch `[a, N]`, see `answer_attention`.
    """

    def __init__(
        self,
        layers: frozenset[int],
        positions: Sequence[Tensor],
        text_positions: Sequence[Tensor] | None = None,
        answers: Sequence[AnswerQueries] | None = None,
        cells: Sequence[Tensor | None] | None = None,
    ) -> None:
        self.layers, self.positions, self.text_positions, self.answers = layers, positions, text_positions, answers
        self.maps: dict[int, Tensor] = {}
        self.text_maps: dict[int, tuple[Tensor, ...]] = {}
        self.answer_maps: dict[int, tuple[Tensor, ...]] = {}
        width = max(map(len, positions), default=0)
        self.positions_BN = torch.zeros(len(positions), width, dtype=torch.long)
        for row, of_row in enumerate(positions):
            self.positions_BN[row, : len(of_row)] = of_row
        self.valid_BN = torch.arange(width) < torch.tensor([len(p) for p in positions])[:, None]
        self.num_keys = int(self.positions_BN.max()) + 1 if width else 0
        # As numbers, so that the forward pass never waits for a GPU to learn a size.
        self.row_positions = [of_row.tolist() for of_row in positions]
        self._bias_of: tuple[Tensor, Tensor | None] | None = None
        self.cells = [None if one is None else TokenCells.of(one) for one in cells or [None] * len(positions)]

    def to(self, device: torch.device) -> "AttentionCapture":
        """Moves the index tensors, so that the forward pass copies nothing."""
        self.positions_BN = self.positions_BN.to(device)
        self.valid_BN = self.valid_BN.to(device)
        self.cells = [None if one is None else one.to(device) for one in self.cells]
        return self

    def bias(self, attention_mask: Tensor | None) -> Tensor | None:
        """`[B, N, k]` float32 to add to the scores of image queries; None where these attend to all keys before them.

        Looked at once in a forward pass, as long as all captured layers share their mask.
        """
        if attention_mask is None:
            return None
        if self._bias_of is None or self._bias_of[0] is not attention_mask:
            bias_BNk = score_bias(attention_mask, self.positions_BN, self.num_keys, torch.float32)
            causal_BNk = score_bias(None, self.positions_BN, self.num_keys, torch.float32)
            differs_BNk = (bias_BNk != causal_BNk) & self.valid_BN[:, :, None]
            self._bias_of = attention_mask, bias_BNk if bool(differs_BNk.any()) else None
        return self._bias_of[1]


def enable_capture(model: PreTrainedModel) -> None:
    """Switches the language model of `model` to the capturing attention; the vision tower keeps plain sdpa.

    Not saved to config.json: call it after every load, in every process.
    """
    register_capture()
    model.set_attn_implementation({"text_config": CAPTURING_SDPA, "vision_config": "sdpa"})


def register_capture() -> None:
    """Makes transformers know `CAPTURING_SDPA`; safe to call again."""
    AttentionInterface.register(CAPTURING_SDPA, _sdpa_with_capture)
    # Under the same name, or the mask arrives as None even with padding: no error, wrong logits.
    AttentionMaskInterface.register(CAPTURING_SDPA, sdpa_mask)


def _sdpa_with_capture(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    capture: AttentionCapture | None = None,
    prefix: PrefixRecord | PrefixContinuation | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    layer = getattr(module, "layer_idx", None)
    if prefix is not None and layer is not None:
        if kwargs.get("position_bias") is not None:
            raise ValueError("a bias of positions has the size of what is read at once, and none of a prefix")
        window = kwargs.get("sliding_window")
        key, value, attention_mask = prefix.at_layer(layer, key, value, attention_mask, window)
    output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if capture is None or layer not in capture.layers:
        return output
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    # Activation checkpointing runs a layer twice and must do the same work twice, but the maps that the loss already
    # holds are those of the first run.
    if capture.num_keys:
        maps = image_block_maps(query, key, attention_mask, capture, scaling)
        capture.maps.setdefault(layer, pooled_maps(maps, [len(one) for one in capture.positions], capture.cells))
        if capture.text_positions is not None:
            texts = capture.text_positions
            with torch.no_grad():
                found = text_rows(query, key, attention_mask, texts, capture.positions, scaling)
            capture.text_maps.setdefault(layer, pooled_rows(found, capture.cells))
    if capture.answers is not None:
        found = answer_attention(query, key, attention_mask, capture.answers, scaling)
        capture.answer_maps.setdefault(layer, pooled_rows(found, capture.cells))
    return output


def image_block_maps(
    query_BHTd: Tensor,
    key_BgTd: Tensor,
    attention_mask: Tensor | None,
    capture: AttentionCapture,
    scaling: float,
) -> Tensor:
    """Attention probabilities after softmax over all keys, averaged over heads, image rows and columns only.

    No `[H, T, T]` tensor exists: without gradients a block of queries is done at a time, against the keys up to the
    last of them; with gradients a head at a time, its probabilities computed again in the backward pass instead of
    being kept.

    Args:
        query_BHTd: queries with rotary positions applied.
        key_BgTd: keys, one per key-value head (g divides H).
        attention_mask: None for plain causal attention, else bool (True = may attend) or additive, `[B|1, 1, T, T]`.
        capture: which rows and columns.
        scaling: factor on the scores.

    Returns:
        `[B, N, N]` float32 (float64 for such queries with gradients); without gradients within 4.5e-8 of eager
        attention in float32.

    Source: docs/method.md#visual-attention-maps
    """
    capture.to(query_BHTd.device)
    if torch.is_grad_enabled() and (query_BHTd.requires_grad or key_BgTd.requires_grad):
        return _differentiable_maps(query_BHTd, key_BgTd, attention_mask, capture, scaling)
    bias_BNk = capture.bias(attention_mask)
    size = capture.positions_BN.shape[1]
    maps_BNN = torch.zeros(len(capture.positions), size, size, dtype=torch.float32, device=query_BHTd.device)
    for row, positions in enumerate(capture.row_positions):
        bias_Nk = None if bias_BNk is None else bias_BNk[row]
        _add_map(maps_BNN[row], query_BHTd[row], key_BgTd[row], positions, capture.positions_BN[row], bias_Nk, scaling)
    return maps_BNN.div_(query_BHTd.shape[1])


def _add_map(
    map_NN: Tensor,
    query_HTd: Tensor,
    key_gTd: Tensor,
    positions: list[int],
    positions_N: Tensor,
    bias_Nk: Tensor | None,
    scaling: float,
) -> None:
    """Adds the probabilities of all heads of one row of the batch to `map_NN`; q is the queries of a block.

    `positions_N` are `positions` on the device, padded.
    """
    if not positions:
        return
    num_kv_heads, _, width = key_gTd.shape
    group = len(query_HTd) // num_kv_heads
    first, last = positions[0], positions[-1]
    consecutive = last - first + 1 == len(positions)
    on_cpu = query_HTd.device.type == "cpu"
    # On a CPU a block should stay in the cache; on a GPU few large kernels are better than many small ones.
    groups_at_once = 1 if on_cpu else num_kv_heads
    budget = CPU_BLOCK_ENTRIES if on_cpu else GPU_BLOCK_ENTRIES
    rows_at_once = min(BLOCK_ROWS, max(1, budget // (groups_at_once * group * (last + 1))))
    where_N = positions_N[: len(positions)]
    query_HNd = query_HTd[:, first : last + 1] if consecutive else query_HTd[:, where_N]
    key_gdk = _for_scores(key_gTd[:, : last + 1]).transpose(1, 2)
    keys_k = torch.arange(last + 1, device=query_HTd.device)
    for start in range(0, len(positions), rows_at_once):
        rows = slice(start, min(start + rows_at_once, len(positions)))
        num_rows = rows.stop - rows.start
        # No key after the last query of the block has a share, unless a mask says otherwise.
        num_keys = positions[rows.stop - 1] + 1 if bias_Nk is None else last + 1
        num_columns = rows.stop if bias_Nk is None else len(positions)
        later_qk = keys_k[positions[start] + 1 : num_keys] > where_N[rows, None] if bias_Nk is None else None
        sum_qk = torch.zeros(num_rows, num_keys, device=query_HTd.device)
        for g in range(0, num_kv_heads, groups_at_once):
            heads = slice(g * group, (g + groups_at_once) * group)
            block_gqd = _for_scores(query_HNd[heads, rows]).reshape(groups_at_once, group * num_rows, width)
            scores_gqk = _products(block_gqd, key_gdk[g : g + groups_at_once, :, :num_keys], scaling)
            scores_Hqk = scores_gqk.view(-1, num_rows, num_keys)
            if later_qk is not None:
                scores_Hqk[:, :, positions[start] + 1 :].masked_fill_(later_qk, torch.finfo(torch.float32).min)
            elif bias_Nk is not None:
                scores_Hqk += bias_Nk[rows, :num_keys]
            sum_qk += _softmax(scores_Hqk).sum(0)
        columns = slice(first, first + num_columns) if consecutive else where_N[:num_columns]
        map_NN[rows, :num_columns] = sum_qk[:, columns]


def _for_scores(tensor: Tensor) -> Tensor:
    """On a CPU in float32, because only GPUs multiply in half precision and sum in float32 at once."""
    return tensor.float() if tensor.device.type == "cpu" else tensor


def _products(query_gqd: Tensor, key_gdk: Tensor, scaling: float) -> Tensor:
    """`[g, q, k]` scores, summed and kept in float32 for any dtype of queries and keys."""
    if query_gqd.dtype == torch.float32 or torch.version.hip is not None:
        return torch.bmm(query_gqd.float(), key_gdk.float()).mul_(scaling)
    return torch.bmm(query_gqd, key_gdk, out_dtype=torch.float32).mul_(scaling)


def _softmax(scores_Hqk: Tensor) -> Tensor:
    """Over keys; on a CPU in place, which halves the memory that passes through the cache."""
    if scores_Hqk.device.type == "cpu":
        return torch.softmax(scores_Hqk, -1, out=scores_Hqk)
    return scores_Hqk.softmax(-1)


def _differentiable_maps(
    query_BHTd: Tensor, key_BgTd: Tensor, attention_mask: Tensor | None, capture: AttentionCapture, scaling: float
) -> Tensor:
    """As `image_block_maps`, head by head under a checkpoint."""
    positions_BN, valid_BN, num_keys = capture.positions_BN, capture.valid_BN, capture.num_keys
    batch, num_heads, _, width = query_BHTd.shape
    # No image token attends past the last one of its sample: causal models by order, Gemma 3 because an image block
    # attends within itself. So later keys have probability zero and are left out.
    bias_BNk = score_bias(attention_mask, positions_BN, num_keys, query_BHTd.dtype)
    index_BNd = positions_BN[:, :, None].expand(-1, -1, width)
    columns_BNN = positions_BN[:, None, :].expand(-1, positions_BN.shape[1], -1)
    group = num_heads // key_BgTd.shape[1]

    def one_head(query_BTd: Tensor, key_BTd: Tensor) -> Tensor:
        rows_BNd = query_BTd.gather(1, index_BNd)
        scores_BNk = rows_BNd @ key_BTd[:, :num_keys].transpose(1, 2) * scaling + bias_BNk
        return scores_BNk.softmax(-1, dtype=dtype).gather(2, columns_BNN)

    size = positions_BN.shape[1]
    dtype = torch.promote_types(query_BHTd.dtype, torch.float32)
    total_BNN = torch.zeros(batch, size, size, dtype=dtype, device=query_BHTd.device)
    for head in range(num_heads):
        query_BTd, key_BTd = query_BHTd[:, head], key_BgTd[:, head // group]
        # Nothing inside is random: its state need be neither kept nor restored for every head.
        total_BNN = total_BNN + checkpoint(one_head, query_BTd, key_BTd, use_reentrant=False, preserve_rng_state=False)
    return total_BNN * (valid_BN[:, :, None] & valid_BN[:, None, :]) / num_heads
