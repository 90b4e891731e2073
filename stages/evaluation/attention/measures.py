"""Measures of attention on image tokens: objects against background, pictures against each other, right and wrong.

Intervals are percentile bootstrap over images: samples about one image are not independent.

Shape letters: i images, j items, R draws.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.strict_model import StrictModel

DRAWS: Final = 2000
SEED: Final = 0
Floats = NDArray[np.float64]


class Estimate(StrictModel):
    """A number and how sure it is."""

    value: float
    interval_95: tuple[float, float] | None
    """Bootstrap over images; None where there are fewer than two."""
    num_images: int


def object_auc(received_N: Tensor, is_object_N: Tensor, is_background_N: Tensor) -> float:
    """How likely an object token receives more than a background token, a tie counting half; NaN without both.

    Source: docs/attention.md#objects-against-background
    """
    objects, background = received_N[is_object_N].double(), received_N[is_background_N].double()
    if not len(objects) or not len(background):
        return float("nan")
    above = (objects[:, None] > background).double() + (objects[:, None] == background).double() / 2
    return float(above.mean())


def map_differences(maps: Sequence[Tensor], keeps: Sequence[Tensor]) -> Tensor:
    """`[i, i]` float64: 1 - cosine of each pair of maps of one size, over entries that are no sink of either.

    Source: docs/attention.md#one-picture-against-another
    """
    kept_iE = torch.stack(list(keeps)).flatten(1).double()
    flat_iE = torch.stack(list(maps)).flatten(1).double() * kept_iE
    squares_ii = flat_iE.square() @ kept_iE.T
    norms_ii = (squares_ii * squares_ii.T).sqrt().clamp(min=1e-300)
    return 1 - (flat_iE @ flat_iE.T) / norms_ii


def row_cosine(student_N: Tensor, teacher_N: Tensor) -> float:
    """Cosine of two rows of attention to the image tokens, over those that are no sink of either row."""
    keep_N = row_keep(student_N) & row_keep(teacher_N)
    return float(torch.cosine_similarity((student_N * keep_N).double(), (teacher_N * keep_N).double(), dim=-1))


def row_keep(row_N: Tensor) -> Tensor:
    """True where a row of attention to the image tokens is at most its mean + std; the others are its sinks."""
    return row_N <= row_N.mean(-1, keepdim=True) + row_N.std(-1, keepdim=True).nan_to_num()


def mean_estimate(values: Sequence[float], images: Sequence[str]) -> Estimate | None:
    """The mean of values that are not NaN; each image is drawn with all of its values. None without any."""
    known = [(value, image) for value, image in zip(values, images, strict=True) if not np.isnan(value)]
    if not known:
        return None
    values_j, weights_Rj = np.array([value for value, _ in known]), _weights([image for _, image in known])
    draws_R = (weights_Rj @ values_j) / weights_Rj.sum(1)
    return _estimate(float(values_j.mean()), draws_R, len({image for _, image in known}))


def pair_estimate(differences_ii: Tensor) -> Estimate | None:
    """The mean over pairs of different images; a draw takes pairs of images, none with itself. None of fewer than 2."""
    values_ii = differences_ii.double().numpy().copy()
    count = len(values_ii)
    if count < 2:
        return None
    np.fill_diagonal(values_ii, 0.0)
    weights_Ri = _weights([str(number) for number in range(count)])
    totals_R = np.einsum("ri,ij,rj->r", weights_Ri, values_ii, weights_Ri, optimize=True)
    pairs_R = weights_Ri.sum(1) ** 2 - (weights_Ri**2).sum(1)
    draws_R = np.divide(totals_R, pairs_R, out=np.full(len(pairs_R), np.nan), where=pairs_R > 0)
    return _estimate(float(values_ii.sum() / (count * (count - 1))), draws_R, count)


def correlation(similarities: Sequence[float], is_right: Sequence[float], images: Sequence[str]) -> Estimate | None:
    """Point-biserial correlation: Pearson's of similarity with 1 for right and 0 for wrong; None if one is constant.

    Source: docs/attention.md#right-and-wrong-answers
    """
    x_j, y_j = np.array(similarities, dtype=np.float64), np.array(is_right, dtype=np.float64)
    if not len(x_j) or np.ptp(x_j) == 0 or np.ptp(y_j) == 0:
        return None
    value = _pearson(np.ones((1, len(x_j))), x_j, y_j)[0]
    return _estimate(float(value), _pearson(_weights(images), x_j, y_j), len(set(images)))


def _pearson(weights_Rj: Floats, x_j: Floats, y_j: Floats) -> Floats:
    shares_Rj = weights_Rj / weights_Rj.sum(1, keepdims=True)
    mean_x_R, mean_y_R = shares_Rj @ x_j, shares_Rj @ y_j
    covariance_R = shares_Rj @ (x_j * y_j) - mean_x_R * mean_y_R
    spread_R = np.sqrt(
        np.clip(shares_Rj @ x_j**2 - mean_x_R**2, 0, None) * np.clip(shares_Rj @ y_j**2 - mean_y_R**2, 0, None)
    )
    found_R: Floats = np.full(len(spread_R), np.nan)
    np.divide(covariance_R, spread_R, out=found_R, where=spread_R > 1e-12)
    return found_R


def _weights(images: Sequence[str]) -> Floats:
    """`[R, j]` how often the image of each value was drawn."""
    number_of = {image: number for number, image in enumerate(sorted(set(images)))}
    count = len(number_of)
    drawn_Ri = np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), size=DRAWS)
    return drawn_Ri[:, [number_of[image] for image in images]].astype(np.float64)


def _estimate(value: float, draws_R: Floats, num_images: int) -> Estimate:
    # A draw of one image alone has no pairs, or no spread.
    known = draws_R[~np.isnan(draws_R)]
    interval = None
    if num_images > 1 and len(known):
        low, high = np.percentile(known, [2.5, 97.5])
        interval = float(low), float(high)
    return Estimate(value=value, interval_95=interval, num_images=num_images)
