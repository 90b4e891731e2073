"""Positions of three axes and the rotary embedding of them by their definitions, in float64 and without the library."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def positions_by_hand(ids_T: Sequence[int], image_id: int, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """`[3, T]`: text counts on in all axes; an image's rows and columns count from where it begins.

    `sizes` are rows and columns of image tokens of each image.
    """
    found: list[tuple[int, int, int]] = []
    images, next_one, at = iter(sizes), 0, 0
    while at < len(ids_T):
        if ids_T[at] != image_id:
            found.append((next_one, next_one, next_one))
            next_one, at = next_one + 1, at + 1
            continue
        rows, columns = next(images)
        found += [(next_one, next_one + row, next_one + column) for row in range(rows) for column in range(columns)]
        next_one, at = next_one + max(rows, columns), at + rows * columns
    return torch.tensor(found).T


def sizes_of(model: Any, inputs: dict[str, Tensor]) -> list[tuple[int, int]]:
    """Rows and columns of image tokens, of a student or its teacher."""
    merge = getattr(model.config, "teacher_config", model.config).vision_config.spatial_merge_size
    return [(int(height) // merge, int(width) // merge) for _, height, width in inputs.get("image_grid_thw", [])]


def rotary_by_hand(
    positions_3T: Tensor, section: Sequence[int], *, interleaved: bool, theta: float = 1e4
) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[T, 2 F]` in float64, for plain frequencies."""
    number = sum(section)
    axes, left = [], list(section)
    for frequency in range(number):
        if interleaved:
            wanted = frequency % 3
            axis = wanted if wanted and left[wanted] > 0 else 0
        else:
            axis = next(axis for axis in range(3) if left[axis] > 0)
        left[axis] -= 1
        axes.append(axis)
    frequencies = theta ** (-torch.arange(number, dtype=torch.float64) / number)
    angles_TF = positions_3T.double()[axes].T * frequencies
    angles_Td = torch.cat([angles_TF, angles_TF], 1)
    return angles_Td.cos(), angles_Td.sin()
