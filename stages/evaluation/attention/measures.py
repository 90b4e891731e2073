"""Measures of attention on image tokens: objects against background, pictures against each other, right and wrong.

Intervals are percentile bootstrap over images: samples about one image are not independent.

Shape letters: i images, j items, R draws.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.strict_model import StrictModel

DRAWS: Final = 2000
SEED: Final = 0
_WEIGHTS_AT_ONCE: Final = 2**21
"""How often images were drawn, of several draws: 16 MB."""
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
    values_j = np.array([value for value, _ in known])
    totals_R, nums_R = _drawn_sums([image for _, image in known], values_j, np.ones_like(values_j)).T
    return _estimate(float(values_j.mean()), totals_R / nums_R, len({image for _, image in known}))


def pair_estimate(differences_ii: Tensor) -> Estimate | None:
    """The mean over pairs of different images; a draw takes pairs of images, none with itself. None of fewer than 2."""
    values_ii = differences_ii.double().numpy().copy()
    count = len(values_ii)
    if count < 2:
        return None
    np.fill_diagonal(values_ii, 0.0)
    weights_Ri = np.concatenate(list(_draws(count)))
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
    columns = np.ones_like(x_j), x_j, y_j, x_j * y_j, x_j**2, y_j**2
    value = _pearson(np.stack(columns, 1).sum(0, keepdims=True))[0]
    return _estimate(float(value), _pearson(_drawn_sums(images, *columns)), len(set(images)))


def _pearson(sums_R6: Floats) -> Floats:
    """Of the sums of 1, x, y, x y, x^2 and y^2."""
    nums_R, *totals = sums_R6.T
    mean_x_R, mean_y_R, mean_xy_R, mean_xx_R, mean_yy_R = (total_R / nums_R for total_R in totals)
    covariance_R = mean_xy_R - mean_x_R * mean_y_R
    spread_R = np.sqrt(np.clip(mean_xx_R - mean_x_R**2, 0, None) * np.clip(mean_yy_R - mean_y_R**2, 0, None))
    found_R: Floats = np.full(len(spread_R), np.nan)
    np.divide(covariance_R, spread_R, out=found_R, where=spread_R > 1e-12)
    return found_R


def _drawn_sums(images: Sequence[str], *columns: Floats) -> Floats:
    """`[R, columns]`: of each draw, the sums over the values of the images drawn."""
    number_of = {image: number for number, image in enumerate(sorted(set(images)))}
    numbers_j = [number_of[image] for image in images]
    sums = [np.bincount(numbers_j, column_j, minlength=len(number_of)) for column_j in columns]
    return np.concatenate([weights_Ri @ np.stack(sums, 1) for weights_Ri in _draws(len(number_of))])


def _draws(num_images: int) -> Iterator[Floats]:
    """`[R, i]` how often each image was drawn, some draws at once: all of them may not fit into memory."""
    generator, shares_i = np.random.default_rng(SEED), np.full(num_images, 1 / num_images)
    size = max(1, _WEIGHTS_AT_ONCE // num_images)
    for start in range(0, DRAWS, size):
        yield generator.multinomial(num_images, shares_i, size=min(size, DRAWS - start)).astype(np.float64)


def _estimate(value: float, draws_R: Floats, num_images: int) -> Estimate:
    # A draw of one image alone has no pairs, or no spread.
    known = draws_R[~np.isnan(draws_R)]
    interval = None
    if num_images > 1 and len(known):
        low, high = np.percentile(known, [2.5, 97.5])
        interval = float(low), float(high)
    return Estimate(value=value, interval_95=interval, num_images=num_images)
