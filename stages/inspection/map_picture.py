"""An attention map as a few lines of characters."""

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

MAX_LINES = 12
"""Lines of a picture; it has twice as many columns, since characters are about twice as high as wide."""


def map_picture(map_NN: Tensor, shades: str) -> list[str]:
    """Lines of characters for the queries of a map, from the first; columns are its keys.

    Each character stands for the mean of a part of the map. Its place in `shades` grows with the square root of this
    mean, up to the largest of the map.
    """
    lines = min(len(map_NN), MAX_LINES)
    means = adaptive_avg_pool2d(map_NN[None].float(), (lines, 2 * lines))[0]
    levels = (means / means.max().clamp(min=1e-12)).sqrt() * (len(shades) - 1)
    return ["".join(shades[level] for level in line) for line in levels.round().int().tolist()]
