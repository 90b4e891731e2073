"""Attention from chosen text tokens to the image tokens, and which scores a query may have at all.

Shape letters: as in `stages/attention/capture.py`; U chosen text tokens of a sample; a its answers; n
image tokens that a query may see.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint


class AnswerQueries(NamedTuple):
    """Of one row of the batch the answers whose attention to its image tokens is wanted."""

    rows_U: Tensor
    """int64, the positions that predict the answers' tokens, one answer after the other."""
    sizes: tuple[int, ...]
    """Rows of each answer, at least one."""
    images_N: Tensor
    """int64, positions of the image tokens, ascending."""


def answer_attention(
    query_BHTd: Tensor,
    key_BgTd: Tensor,
    attention_mask: Tensor | None,
    queries: Sequence[AnswerQueries],
    scaling: float,
) -> tuple[Tensor, ...]:
    """Of each row of the batch `[a, N]`: the mean over each answer's rows of `text_rows`.

    Source: docs/method.md#answer-attention
    """
    rows, images = [one.rows_U for one in queries], [one.images_N for one in queries]
    found = text_rows(query_BHTd, key_BgTd, attention_mask, rows, images, scaling)
    return tuple(
        torch.stack([part_UN.mean(0) for part_UN in torch.split(rows_UN, list(one.sizes))]) if one.sizes else rows_UN
        for rows_UN, one in zip(found, queries, strict=True)
    )


def text_rows(
    query_BHTd: Tensor,
    key_BgTd: Tensor,
    attention_mask: Tensor | None,
    text_positions: Sequence[Tensor],
    image_positions: Sequence[Tensor],
    scaling: float,
) -> tuple[Tensor, ...]:
    """Of each row of the batch the probabilities `[U, N]` of its chosen queries at its image tokens, mean over heads.

    The softmax is over all keys that a query may attend to, in float32 or the wider type of the queries. With gradients
    a group of heads is done at a time, its probabilities computed again in the backward pass instead of being kept.
    Without chosen queries or image tokens the tensor is empty. Image positions ascend.
    """
    device, group = query_BHTd.device, query_BHTd.shape[1] // key_BgTd.shape[1]
    dtype = torch.promote_types(query_BHTd.dtype, torch.float32)
    learns = torch.is_grad_enabled() and (query_BHTd.requires_grad or key_BgTd.requires_grad)
    found = []
    for row, (queries_U, images_N) in enumerate(zip(text_positions, image_positions, strict=True)):
        num_keys = key_BgTd.shape[2]
        if attention_mask is None:
            num_keys = int(queries_U.max()) + 1 if len(queries_U) else 0
        # An image token behind the last query has no share; with a mask its key is among the others.
        num_seen = int((images_N < num_keys).sum())
        if not len(queries_U) or not num_seen:
            found.append(torch.zeros(len(queries_U), len(images_N), dtype=dtype, device=device))
            continue
        at_U, seen_n = queries_U.to(device), images_N[:num_seen].to(device)
        mask = None if attention_mask is None else attention_mask[row % len(attention_mask)][None]
        bias_Uk = score_bias(mask, at_U[None], num_keys, dtype)[0]
        total_Un = torch.zeros(len(queries_U), num_seen, dtype=dtype, device=device)
        for kv_head, keys_Td in enumerate(key_BgTd[row]):
            heads_gTd = query_BHTd[row, kv_head * group : (kv_head + 1) * group]
            inputs = (heads_gTd, keys_Td, at_U, seen_n, bias_Uk, scaling)
            if learns:
                # Nothing inside is random.
                part_Un = checkpoint(_of_group, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                part_Un = _of_group(*inputs)
            total_Un = total_Un + part_Un
        found.append(pad(total_Un / query_BHTd.shape[1], (0, len(images_N) - num_seen)))
    return tuple(found)


def _of_group(
    heads_gTd: Tensor, keys_Td: Tensor, at_U: Tensor, seen_n: Tensor, bias_Uk: Tensor, scaling: float
) -> Tensor:
    """`[U, n]` probabilities of the heads that share a key-value head, summed."""
    queries_gUd, keys_kd = heads_gTd[:, at_U].to(bias_Uk.dtype), keys_Td[: bias_Uk.shape[1]].to(bias_Uk.dtype)
    scores_gUk = queries_gUd @ keys_kd.T * scaling + bias_Uk
    return scores_gUk.softmax(-1)[:, :, seen_n].sum(0)


def score_bias(attention_mask: Tensor | None, positions_BN: Tensor, num_keys: int, dtype: torch.dtype) -> Tensor:
    """`[B, N, k]` to add to the scores: 0 where a query may attend, the lowest float where not."""
    if attention_mask is None:
        allowed_BNk = torch.arange(num_keys, device=positions_BN.device) <= positions_BN[:, :, None]
    else:
        mask_BTk = attention_mask[:, 0, :, :num_keys].expand(positions_BN.shape[0], -1, -1)
        allowed_BNk = mask_BTk.gather(1, positions_BN[:, :, None].expand(-1, -1, num_keys))
        if allowed_BNk.dtype != torch.bool:
            return allowed_BNk.to(dtype)
    zeros_BNk = torch.zeros(allowed_BNk.shape, dtype=dtype, device=allowed_BNk.device)
    return zeros_BNk.masked_fill(~allowed_BNk, torch.finfo(dtype).min)
