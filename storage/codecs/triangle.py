"""Which entries of a map are stored, and in which order.

A causal map is zero above its diagonal, so its lower triangle is stored, row by row: entry (i, j) lies at
i*(i+1)/2 + j, as in 00 10 11 20 21 22. Models whose image tokens attend both ways (Gemma 3) store the square.
"""

from functools import lru_cache

import torch
from torch import Tensor

from storage.codecs.codec_settings import num_entries


def pack_entries(maps: Tensor, causal: bool) -> Tensor:
    """`[..., E]`: the stored entries of maps `[..., N, N]`, whose rows are queries; same dtype and device.

    Raises:
        ValueError: If the last two sizes differ.
    """
    if maps.ndim < 2 or maps.shape[-1] != maps.shape[-2]:
        raise ValueError(f"maps are {tuple(maps.shape)}, expected [..., N, N] with equal last sizes")
    flat = maps.flatten(-2)
    return flat.index_select(-1, _triangle_index(maps.shape[-1], maps.device)) if causal else flat


def unpack_entries(entries: Tensor, num_tokens: int, causal: bool) -> Tensor:
    """`[..., N, N]`: the inverse of `pack_entries`, with zeros above the diagonal of a causal map.

    Raises:
        ValueError: If E does not belong to N.
    """
    if entries.shape[-1] != (expected := num_entries(num_tokens, causal)):
        raise ValueError(
            f"{entries.shape[-1]} entries cannot fill a {'causal' if causal else 'full'} map of {num_tokens} "
            f"tokens, expected {expected}; check `causal` and the number of image tokens"
        )
    shape = (*entries.shape[:-1], num_tokens, num_tokens)
    if not causal:
        return entries.reshape(shape)
    flat = entries.new_zeros((*entries.shape[:-1], num_tokens * num_tokens))
    return flat.index_copy_(-1, _triangle_index(num_tokens, entries.device), entries).view(shape)


@lru_cache(maxsize=16)
def _triangle_index(num_tokens: int, device: torch.device) -> Tensor:
    """Positions of the lower triangle in a flattened square, in row order."""
    rows, columns = torch.tril_indices(num_tokens, num_tokens, device=device)
    index: Tensor = rows * num_tokens + columns
    return index
