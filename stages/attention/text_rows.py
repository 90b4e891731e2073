"""Attention from chosen text tokens to the image tokens, and which scores a query may have at all.

Shape letters: as in `stages/attention/capture.py`; U chosen text tokens of a sample.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def text_rows(
    query_BHTd: Tensor,
    key_BgTd: Tensor,
    attention_mask: Tensor | None,
    text_positions: Sequence[Tensor],
    image_positions: Sequence[Tensor],
    scaling: float,
) -> tuple[Tensor, ...]:
    """Of each row of the batch the probabilities `[U, N]` of its chosen queries at its image tokens, mean over heads.

    The softmax is over all keys that a query may attend to, in float32 or the wider type of the queries. No gradient
    flows. Without chosen queries or image tokens the tensor is empty.
    """
    group = query_BHTd.shape[1] // key_BgTd.shape[1]
    found = []
    for row, (queries_U, images_N) in enumerate(zip(text_positions, image_positions, strict=True)):
        queries_U, images_N = queries_U.to(query_BHTd.device), images_N.to(query_BHTd.device)
        dtype = torch.promote_types(query_BHTd.dtype, torch.float32)
        total_UN = torch.zeros(len(queries_U), len(images_N), dtype=dtype, device=query_BHTd.device)
        if total_UN.numel():
            num_keys = int(queries_U.max()) + 1 if attention_mask is None else key_BgTd.shape[2]
            mask = None if attention_mask is None else attention_mask[row % len(attention_mask)][None]
            bias_Uk = score_bias(mask, queries_U[None], num_keys, dtype)[0]
            for kv_head, keys_Td in enumerate(key_BgTd[row].to(dtype)):
                heads_gUd = query_BHTd[row, kv_head * group : (kv_head + 1) * group][:, queries_U].to(dtype)
                scores_gUk = heads_gUd @ keys_Td[:num_keys].T * scaling + bias_Uk
                # An image token behind the last query has no share; with a mask its key is among the others.
                seen_N = images_N < num_keys
                total_UN[:, seen_N] += scores_gUk.softmax(-1)[:, :, images_N[seen_N]].sum(0)
        found.append(total_UN / query_BHTd.shape[1])
    return tuple(found)


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
