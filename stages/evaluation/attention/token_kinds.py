"""Which image tokens of a picture show its objects, and which show background."""

from typing import Final

import numpy as np
import torch
from torch import Tensor

from stages.evaluation.attention.objects import RASTER, ObjectPlaces

OBJECT_SHARE: Final = 0.5
"""A token shows an object if this much of its box, or more, is covered; it is background if nothing is."""


def token_kinds(boxes_N4: Tensor, places: ObjectPlaces) -> tuple[Tensor, Tensor]:
    """`[N]` bool each: which image tokens show an object, and which show background only.

    Those between, at the edge of objects, and those that show nothing are neither.
    """
    counts = np.pad(places.covered().cumsum(0, dtype=np.int32).cumsum(1), ((1, 0), (1, 0)))
    left, top, right, bottom = (boxes_N4.double() * RASTER).round().long().clamp(0, RASTER).T.numpy()
    covered = counts[bottom, right] - counts[top, right] - counts[bottom, left] + counts[top, left]
    area = (right - left) * (bottom - top)
    is_object = (area > 0) & (covered >= OBJECT_SHARE * area)
    is_background = (area > 0) & (covered == 0)
    return torch.from_numpy(is_object), torch.from_numpy(is_background)
