"""How the image tokens of a sample lie side by side, and the cells of neighbours that they form."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from stages.families.family import Family
from storage.errors import UserError


class TokenGrid(NamedTuple):
    """Consecutive image tokens that lie in rows, row by row."""

    rows: int
    columns: int
    num_missing: int = 0
    """Tokens that its first row lacks at its begin."""
    ends_rows: bool = False
    """Whether each row has one more token, which shows nothing."""

    @property
    def num_tokens(self) -> int:
        """Image tokens in it."""
        return self.rows * (self.columns + self.ends_rows) - self.num_missing


def token_grids(
    family: Family, processor: Any, pixel_inputs: Mapping[str, Tensor], num_tokens: int, num_images: int
) -> list[TokenGrid]:
    """The grids of a sample's image tokens, in their order.

    Raises:
        UserError: If it is not known how they lie, or they are not as many as the grids have; names the family.
    """
    name = "/".join(family.model_types)
    if why := family.why_no_cells():
        raise UserError(f"image tokens of {name} form no cells: {why}; set teacher.map_pooling to 1")
    if not num_images:
        return []
    if family.layout == "sizes":
        merge = processor.image_processor.merge_size
        sizes = pixel_inputs["image_grid_thw"].tolist()
        grids = [TokenGrid(high // merge, wide // merge) for times, high, wide in sizes for _ in range(times)]
    elif family.layout == "tiles_in_rows":
        sizes = pixel_inputs["image_sizes"].tolist()
        grids = [grid for high, wide in sizes for grid in _tiled(processor, high, wide)]
    else:
        size = num_tokens // num_images
        if family.layout == "square_tiles":
            size = getattr(processor, "image_seq_len", None) or processor.image_seq_length
        grids = _squares(size) * (num_tokens // max(size, 1))
    if sum(grid.num_tokens for grid in grids) != num_tokens:
        raise UserError(
            f"{num_tokens} image tokens of {num_images} images of {name} form no grids of neighbours, found "
            f"{[f'{grid.rows}x{grid.columns}' for grid in grids]}; set teacher.map_pooling to 1"
        )
    return grids


def _squares(num_tokens: int) -> list[TokenGrid]:
    """A square; its first token may be missing where the model takes it for a class token that is not there."""
    sides = ((math.isqrt(num_tokens + missing), missing) for missing in (0, 1))
    return [TokenGrid(side, side, missing) for side, missing in sides if side * side == num_tokens + missing][:1]


def _tiled(processor: Any, height: int, width: int) -> list[TokenGrid]:
    images = processor.image_processor
    edge = images.size["shortest_edge"] if "shortest_edge" in images.size else images.size["height"]
    side = edge // processor.patch_size
    rows, columns = get_anyres_image_grid_shape((height, width), images.image_grid_pinpoints, edge)
    _, high, wide = unpad_image(torch.zeros(1, rows * side, columns * side), (height, width)).shape
    return [TokenGrid(side, side), TokenGrid(high, wide, ends_rows=True)]


def token_cells(grids: Sequence[TokenGrid], side: int) -> Tensor:
    """`[X]` int32: the cell of each image token, numbered in the order of their first tokens.

    A cell has `side` x `side` neighbours of one grid, fewer at the lower and right rim where sizes are no multiples.
    The tokens that end rows are in cells of their own, `side` of them in each.
    """
    parts, first = [torch.zeros(0, dtype=torch.int64)], 0
    for grid in grids:
        across = -(-grid.columns // side)
        columns_w = torch.arange(grid.columns) // side
        if grid.ends_rows:
            columns_w = torch.cat([columns_w, torch.tensor([across])])
        across += grid.ends_rows
        rows_h = torch.arange(grid.rows) // side
        cells = (rows_h[:, None] * across + columns_w).flatten()[grid.num_missing :]
        # A cell that has lost its only token to the missing ones is none.
        numbers = torch.unique(cells, return_inverse=True)[1] + first
        parts.append(numbers)
        first = int(numbers[-1]) + 1
    return torch.cat(parts).to(torch.int32)
