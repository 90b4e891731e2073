"""Which entries of a map are attention sinks, and how a mask is stored once it was guessed nearly right."""

import torch
from torch import Tensor

_ESCAPE = 255


def sink_keep_mask(maps: Tensor) -> Tensor:
    """`[..., N, N]` bool: which entries are neither attention sinks nor zero: (B <= mean(B) + std(B)) & (B > 0).

    Statistics are over the whole square, zeros above the diagonal included, sample standard deviation (N*N - 1). They
    are summed in float64, so the mask does not depend on batch, threads or device; the threshold is then rounded to
    the map's dtype.

    Source: docs/method.md#attention-loss, the teacher's two factors of `keep`
    """
    entries = maps.detach().flatten(-2)
    return below_threshold(entries, sink_threshold(entries, entries.shape[-1])).view(maps.shape)


def sink_threshold(entries: Tensor, square: int) -> Tensor:
    """`[...]` mean + std of maps given by `map_mean_std`'s arguments, in the entries' dtype."""
    mean, std = map_mean_std(entries, square)
    return (mean + std).to(entries.dtype)


def below_threshold(entries: Tensor, threshold: Tensor) -> Tensor:
    """`[..., E]` bool: entries that are kept under `threshold` `[...]`."""
    return (entries <= threshold[..., None]) & (entries > 0)


def map_mean_std(entries: Tensor, square: int) -> tuple[Tensor, Tensor]:
    """Mean and sample std of maps over their whole square of N * N, float64 `[...]` each; the std of one entry is 0.

    `entries` `[..., E]` are the square in any order, or a part of it outside of which all is zero.
    """
    exact = entries.detach().double()
    mean = exact.sum(-1) / max(square, 1)
    if square < 2:
        return mean, torch.zeros_like(mean)
    squares = torch.linalg.vector_norm(exact, dim=-1).square() - square * mean.square()
    return mean, (squares.clamp(min=0) / (square - 1)).sqrt()


def encode_flips(flips_E: Tensor) -> Tensor:
    """`[G]` uint8: the positions of the True entries of a one-dimensional mask as gaps, one byte each.

    A byte below 255 says how many entries lie between the previous True (or the start) and the next one; 255 says
    that 255 entries pass without one. So False, True, True is 1, 0.
    """
    positions = flips_E.nonzero()[:, 0]
    gaps = positions.diff(prepend=positions.new_full((1,), -1)) - 1
    passes = gaps // _ESCAPE
    ends = (passes + 1).cumsum(0)
    size = int(ends[-1]) if len(ends) else 0
    encoded = torch.full((size,), _ESCAPE, dtype=torch.uint8, device=flips_E.device)
    encoded[ends - 1] = (gaps % _ESCAPE).to(torch.uint8)
    return encoded


def decode_flips(encoded_G: Tensor, count: int) -> Tensor:
    """Rising int64 positions of the True entries of a mask of `count` entries: the inverse of `encode_flips`.

    Raises:
        ValueError: If a position lies past `count`.
    """
    if encoded_G.dtype != torch.uint8 or encoded_G.ndim != 1:
        raise ValueError(f"flips are {encoded_G.dtype} {tuple(encoded_G.shape)}, expected one-dimensional uint8")
    steps = encoded_G.long()
    is_position = steps < _ESCAPE
    positions = (steps + is_position).cumsum(0)[is_position] - 1
    if len(positions) and int(positions[-1]) >= count:
        raise ValueError(f"a flip lies at entry {int(positions[-1])} of masks that have {count} entries together")
    return positions
