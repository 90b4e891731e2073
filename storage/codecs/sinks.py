"""The exact sink masks of the teacher's windows, one bit an entry.

Letters: W windows, N image tokens, E stored entries of one map (`triangle.py`).

One flipped entry in a late, short column is enough to spoil the loss's gradient, so these bits are taken
from the exact float32 map while the teacher runs, never from coded values.
"""

import torch
from torch import Tensor

from storage.codecs.triangle import num_entries, pack_entries, unpack_entries


def sink_keep_mask(maps: Tensor) -> Tensor:
    """Which entries are neither attention sinks nor zero: (B <= mean(B) + std(B)) & (B > 0).

    Statistics are over the whole square, zeros above the diagonal included, sample standard deviation (N*N
    - 1). They are summed in float64, so the mask does not depend on batch, threads or device; the threshold
    is then rounded to the map's dtype.

    Args:
        maps: `[..., N, N]` floating point, rows are queries.

    Returns:
        `[..., N, N]` bool.

    Source: METHOD, "VAT", the teacher's two factors of `keep`.
    """
    mean, std = map_mean_std(maps)
    threshold = (mean + std).to(maps.dtype)
    return (maps <= threshold[..., None, None]) & (maps > 0)


def map_mean_std(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sample std of each map of `[..., N, N]`, float64 `[...]`; the std of one entry is 0."""
    flat = maps.detach().flatten(-2)
    count = flat.shape[-1]
    mean = flat.mean(-1, dtype=torch.float64)
    if count < 2:
        return mean, torch.zeros_like(mean)
    # Deviations from the rounded mean: the remainder of that rounding is taken off again below.
    centre = mean.to(flat.dtype)
    norm = torch.linalg.vector_norm(flat - centre[..., None], dim=-1, dtype=torch.float64)
    squares = norm.square() - count * (mean - centre.double()).square()
    return mean, (squares.clamp(min=0) / (count - 1)).sqrt()


def packed_mask_bytes(num_tokens: int, causal: bool) -> int:
    """Bytes of one window's packed mask: ceil(E / 8)."""
    return (num_entries(num_tokens, causal) + 7) // 8


def pack_mask(mask_WNN: Tensor, causal: bool) -> Tensor:
    """Eight entries a byte: entry e is bit e % 8 (the lowest is 0) of byte e // 8; spare bits of the last
    are 0.

    Args:
        mask_WNN: `[..., N, N]` bool.
        causal: Whether only the lower triangle is stored; entries above it are False by B > 0.

    Returns:
        `[..., ceil(E / 8)]` uint8 on the same device.

    Raises:
        ValueError: If the mask is not bool, or True above the diagonal of a causal one.
    """
    if mask_WNN.dtype != torch.bool:
        raise ValueError(f"mask is {mask_WNN.dtype}, expected bool")
    if causal and bool(mask_WNN.triu(1).any()):
        raise ValueError("a causal mask keeps entries above the diagonal; set map_codec.causal to false")
    entries = pack_entries(mask_WNN, causal).to(torch.uint8)
    entries = torch.nn.functional.pad(entries, (0, -entries.shape[-1] % 8))
    octets = entries.reshape(*entries.shape[:-1], entries.shape[-1] // 8, 8)
    packed: Tensor = (octets << _bit_numbers(entries.device)).sum(-1, dtype=torch.uint8)
    return packed


def unpack_mask(packed: Tensor, num_tokens: int, causal: bool) -> Tensor:
    """The inverse of `pack_mask`.

    Args:
        packed: `[..., ceil(E / 8)]` uint8.
        num_tokens: N.
        causal: As given to `pack_mask`.

    Returns:
        `[..., N, N]` bool.

    Raises:
        ValueError: If the number of bytes does not belong to N.
    """
    expected = packed_mask_bytes(num_tokens, causal)
    if packed.shape[-1] != expected or packed.dtype != torch.uint8:
        raise ValueError(
            f"packed mask is {packed.dtype} with {packed.shape[-1]} bytes, expected uint8 with {expected} "
            f"for {num_tokens} image tokens"
        )
    bits = (packed[..., None] >> _bit_numbers(packed.device)) & 1
    entries = bits.flatten(-2)[..., : num_entries(num_tokens, causal)]
    return unpack_entries(entries.bool(), num_tokens, causal)


def _bit_numbers(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
