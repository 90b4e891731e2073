"""Mean and covariance of one image's maps, by which the sink threshold of any mean of them is known without them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from storage.codecs.triangle import pack_entries, unpack_entries


def layer_moments(entries_LE: Tensor, square: int) -> tuple[Tensor, Tensor]:
    """What `window_thresholds` needs of the maps.

    Products are summed and their means taken away in float64; only then are they rounded, so nothing cancels in
    what is rounded. Of attention maps, whose covariances are hardly ever negative, nothing cancels later either.

    Args:
        entries_LE: `[L, E]`: the square in any order, or a part of it outside of which all is zero.
        square: N * N.

    Returns:
        `[L]` means over the square and `[P]` covariances (N*N - 1; 0 for one entry), the lower triangle row by row;
        float32, on the same device.
    """
    exact_LE = entries_LE.detach().double()
    means_L = exact_LE.sum(-1) / max(square, 1)
    centred_LL = exact_LE @ exact_LE.T - square * means_L[:, None] * means_L
    covariances_LL = centred_LL / max(square - 1, 1)
    return means_L.float(), pack_entries(covariances_LL.float(), causal=True)


def window_thresholds(rows: Sequence[Sequence[int]], means_L: Tensor, covariances_P: Tensor) -> Tensor:
    """`[W]` float32 mean + std of each window's uncoded map, within 2**-22 of it while no covariance is negative.

    `rows` has for each window the rows of its layers; the moments are those of `layer_moments`.

    Raises:
        ValueError: If there are not as many covariances as pairs of layers.
    """
    lower_LL = unpack_entries(covariances_P.double(), len(means_L), causal=True)
    covariances_LL = lower_LL + lower_LL.tril(-1).T
    thresholds = [
        means_L[members].double().mean() + covariances_LL[members][:, members].mean().clamp(min=0).sqrt()
        for members in map(list, rows)
    ]
    return torch.stack(thresholds).float() if thresholds else means_L.new_zeros(0)
