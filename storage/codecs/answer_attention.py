"""Answer attention: of each captured layer and answer the mean attention to the image tokens, 16 bits a value.

An answer is a run of answer tokens, one for each turn that the sample keeps. Its vector is the mean, over heads and
over the rows that predict its tokens, of the attention to each of the sample's N image tokens. Sinks are not stored:
they follow from the stored values (docs/method.md#answer-attention), for any window of layers.
"""

import torch
from torch import Tensor

MAX_SUM_ERROR = 2.0**-8
"""Values of a softmax sum to 1 at most; rounded to 16 bits, to less than this more."""


def num_answers(answer_mask_T: Tensor) -> int:
    """Answers of a sample: runs of True in its mask."""
    return int(answer_mask_T[:1].sum() + (answer_mask_T[1:] & ~answer_mask_T[:-1]).sum())


def fault(values_LaN: Tensor) -> str | None:
    """What no attention has: NaN, values below 0, or more than 1 in sum; None if sound."""
    exact_LaN = values_LaN.double()
    if not bool(torch.isfinite(exact_LaN).all()):
        return "NaN or infinite values"
    if bool((exact_LaN < 0).any()):
        return f"a value of {float(exact_LaN.min()):.4g}"
    if bool((exact_LaN.sum(-1) > 1 + MAX_SUM_ERROR).any()):
        return f"values that sum to {float(exact_LaN.sum(-1).max()):.4f}"
    return None
