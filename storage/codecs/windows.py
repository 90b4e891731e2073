"""Windows of captured layers: their rows, their means, and what is stored of each beside the codes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WindowRows = Sequence[Sequence[int]]
"""Of each window the rows of its layers among the captured ones."""


@dataclass(frozen=True)
class EncodedWindows:
    """What is stored of one image's windows beside the codes of its maps."""

    thresholds_W: Tensor
    """float32, mean + std of each uncoded window map."""
    shifts_WN: Tensor
    """float16, what the kept entries of each key's column lack on average."""
    flips_G: Tensor
    """uint8, see `encode_flips`: where the masks, one after the other, are not what the codes say."""
    means_L: Tensor
    covariances_P: Tensor
    """float32 both, see `layer_moments`: of the uncoded maps, for windows that are not stored."""
    tail_blocks_LY: Tensor
    """float16, the uncoded entries of the last `tail_block_size` queries and keys, packed as a map of that size."""

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "EncodedWindows":
        """The same on a device."""
        return EncodedWindows(*(part.to(device, non_blocking=non_blocking) for part in vars(self).values()))


def window_rows(layers: Sequence[int], windows: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Rows of each window's layers among `layers`."""
    row_of = {layer: row for row, layer in enumerate(layers)}
    return tuple(tuple(row_of[layer] for layer in window) for window in windows)


def window_means(maps: Tensor, rows: WindowRows) -> Tensor:
    """`[W, ...]` float32 mean of each window over the first dimension of `maps` `[L, ...]`, rounded once."""
    members_WL = window_members(rows, len(maps), maps.device)
    sums_WE = members_WL @ maps.flatten(1).double()
    return (sums_WE / members_WL.sum(1, keepdim=True)).float().view(len(rows), *maps.shape[1:])


def window_members(rows: WindowRows, num_layers: int, device: torch.device) -> Tensor:
    """`[W, L]` float64, 1 where a layer is in a window."""
    members_WL = torch.zeros(len(rows), num_layers, dtype=torch.float64)
    for window, members in enumerate(rows):
        members_WL[window, list(members)] = 1
    return members_WL.to(device)
