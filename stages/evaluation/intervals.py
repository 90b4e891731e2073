"""Confidence intervals of proportions."""

import math
from typing import Final

_Z_95: Final = 1.959963984540054


def wilson_interval(successes: float, num_trials: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion.

    Args:
        successes: Between 0 and `num_trials`; a tie counts half.
        num_trials: At least 1.

    Returns:
        Lower and upper bound, within 0 and 1.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if num_trials < 1 or not 0 <= successes <= num_trials:
        raise ValueError(f"{successes} successes of {num_trials} trials")
    share, z2 = successes / num_trials, _Z_95**2
    center = (share + z2 / (2 * num_trials)) / (1 + z2 / num_trials)
    spread = math.sqrt(share * (1 - share) / num_trials + z2 / (4 * num_trials**2))
    half = _Z_95 * spread / (1 + z2 / num_trials)
    return max(0.0, center - half), min(1.0, center + half)
