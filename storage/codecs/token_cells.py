"""Cells of neighbouring image tokens: what a map with a row and a column for each cell is, and who sees whom in it.

Shape letters: X image tokens, N cells of them, m members of the largest cell.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class TokenCells:
    """Which image tokens make up each cell.

    Attributes:
        members_Nm: int64, the tokens of each cell, rising; X, which is none of them, where a cell has fewer than m.
        sizes_N: int64, tokens of each cell, at least 1.
    """

    members_Nm: Tensor
    sizes_N: Tensor

    @classmethod
    def of(cls, cells_X: Tensor) -> "TokenCells":
        """From the cell of each image token, numbered from 0 in the order of their first tokens; on the CPU."""
        cells_X = cells_X.long()
        num_tokens, sizes_N = len(cells_X), torch.bincount(cells_X)
        order_X = cells_X.argsort(stable=True)
        first_N = sizes_N.cumsum(0) - sizes_N
        place_X = torch.arange(num_tokens) - first_N[cells_X[order_X]]
        members_Nm = torch.full((len(sizes_N), int(sizes_N.max())), num_tokens)
        members_Nm[cells_X[order_X], place_X] = order_X
        return cls(members_Nm, sizes_N)

    def __len__(self) -> int:
        return len(self.sizes_N)

    def to(self, device: torch.device) -> "TokenCells":
        """The same on a device."""
        return TokenCells(self.members_Nm.to(device), self.sizes_N.to(device))

    def sums(self, values: Tensor) -> Tensor:
        """`[..., N]` of `[..., X]`: the sum over the tokens of each cell, from the first to the last.

        In this order on any device and in any company, so that the same values give the same bits.
        """
        padded = pad(values, (0, 1))
        # Layers of one model may lie on several devices.
        first, *others = self.members_Nm.to(values.device).unbind(1)
        total = padded.index_select(-1, first)
        for members_N in others:
            total = total + padded.index_select(-1, members_N)
        return total

    def pooled(self, map_XX: Tensor) -> Tensor:
        """`[N, N]`: the mean over a cell's queries of their attention to a cell, which is the sum over its keys.

        Source: docs/method.md#maps-of-cells
        """
        to_cells_XN = self.sums(map_XX)
        return (self.sums(to_cells_XN.T) / self.sizes_N.to(map_XX.device)).T


def pooled_maps(maps_BXX: Tensor, num_tokens: Sequence[int], cells: Sequence[TokenCells | None]) -> Tensor:
    """`[B, N, N]` maps of cells of a batch, padded with zeros to the largest.

    `num_tokens` are the image tokens of each row, 0 for one without a map; a row without cells stays as it is.
    """
    if all(one is None for one in cells):
        return maps_BXX
    found = []
    for map_XX, size, own in zip(maps_BXX, num_tokens, cells, strict=True):
        map_XX = map_XX[:size, :size]
        found.append(map_XX if own is None or not size else own.pooled(map_XX))
    width = max(map(len, found))
    return torch.stack([pad(one, (0, width - len(one), 0, width - len(one))) for one in found])


def pooled_rows(rows: Sequence[Tensor], cells: Sequence[TokenCells | None]) -> tuple[Tensor, ...]:
    """Of each row of a batch the attention of some queries to cells, from that to image tokens."""
    pairs = zip(rows, cells, strict=True)
    return tuple(one if own is None or not one.numel() else own.sums(one) for one, own in pairs)


def attended_cells(cells_X: Tensor) -> Tensor:
    """`[N, N]` bool: whether a token of the query's cell comes after, or is, one of the key's cell.

    Where image tokens see only those before them, a map is zero elsewhere. It is more than the lower triangle: cells of
    the same rows of a picture see each other.
    """
    cells_X = cells_X.long()
    places_X = torch.arange(len(cells_X), device=cells_X.device)
    # The numbers of cells rise with their first tokens.
    last_N = places_X.new_zeros(len(cells_X)).scatter_reduce(0, cells_X, places_X, "amax")
    first_N = places_X.new_full((len(cells_X),), len(cells_X)).scatter_reduce(0, cells_X, places_X, "amin")
    num_cells = num_cells_of(cells_X)
    return last_N[:num_cells, None] >= first_N[None, :num_cells]


def num_cells_of(cells_X: Tensor) -> int:
    """How many cells there are."""
    return int(cells_X.max()) + 1 if len(cells_X) else 0


def cells_fault(cells_X: Tensor, num_cells: int) -> str | None:
    """What is wrong with the cells of a map's image tokens; None where all is right."""
    found = cells_X.long()
    if not len(found):
        return "no image token"
    highest_X = found.cummax(0).values
    before_X = torch.cat([found.new_full((1,), -1), highest_X[:-1]])
    if int(found.min()) < 0 or bool((found > before_X + 1).any()):
        return "cells that are not numbered in the order of their first tokens"
    return None if num_cells_of(found) == num_cells else f"{num_cells_of(found)} cells for a map of {num_cells}"
