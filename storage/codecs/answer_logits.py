"""The k most likely next tokens of each answer row, and exactly how much probability lies outside them.

Letters: R answer rows, V vocabulary, K kept tokens a row (k, or V if that is smaller).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS_AT_ONCE = 64
"""Bounds the float64 copy: 64 rows of 151,936 words are 78 MB."""


@dataclass(frozen=True)
class AnswerLogits:
    """What the teacher predicts at the answer rows, as stored."""

    ids_RK: Tensor
    """int32, by falling log-probability, equal ones by rising id."""
    logprobs_RK: Tensor
    """float16, normalised over the whole vocabulary at temperature 1."""
    tail_logmass_R: Tensor
    """float32, log of the probability of all other tokens; -inf when there is none."""
    log_partition_R: Tensor
    """float32, logsumexp of the logits: logprob + log_partition is the logit again."""

    def __len__(self) -> int:
        return len(self.ids_RK)

    def rows(self, start: int, stop: int) -> "AnswerLogits":
        """Rows `start` to `stop`."""
        return AnswerLogits(*(tensor[start:stop] for tensor in self._tensors()))

    def to(self, device: torch.device | str) -> "AnswerLogits":
        """On `device`."""
        return AnswerLogits(*(tensor.to(device, non_blocking=True) for tensor in self._tensors()))

    @staticmethod
    def cat(parts: "Sequence[AnswerLogits]") -> "AnswerLogits":
        """All rows one after another; none for no parts."""
        if not parts:
            empty_R = torch.zeros(0)
            return AnswerLogits(torch.zeros(0, 0, dtype=torch.int32), torch.zeros(0, 0).half(), empty_R, empty_R)
        return AnswerLogits(*map(torch.cat, zip(*(part._tensors() for part in parts), strict=True)))

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.ids_RK, self.logprobs_RK, self.tail_logmass_R, self.log_partition_R


def top_k_logprobs(logits_RV: Tensor, k: int) -> AnswerLogits:
    """Keep the k largest log-probabilities of each row and the mass of the rest.

    Sums are taken in float64. A stored log-probability l is within 2**-11 * max(|l|, 2**-14) of the exact
    one.

    The tail is the *exact* mass outside the k, not 1 minus the stored ones: where the teacher is sure, the
    tail (1e-6, say) is smaller than the rounding of the stored values (up to 2e-4), and that difference
    would be noise or negative. Its price: kept and tail masses sum to 1 only within 2**-11 * H, where H =
    sum p |ln p| over the kept tokens (at most 1.02 * 2**-11 * ln(k + 1), or 0.0021 at k = 64; measured:
    5e-4 at most over random rows at k = 64). Divide by that sum (`renormalized`); what is left is of second
    order, a KL below 3e-6.

    Args:
        logits_RV: `[R, V]` floating point; -inf forbids a token. Any device.
        k: Tokens to keep, at least 1; more than V means all of V.

    Returns:
        Tensors on the same device.

    Raises:
        ValueError: For NaN or +inf logits, for rows without a finite logit, and for k < 1.
    """
    if logits_RV.ndim != 2 or not logits_RV.is_floating_point() or k < 1:
        found = f"{logits_RV.dtype} {tuple(logits_RV.shape)} with k={k}"
        raise ValueError(f"logits are {found}, expected floats [R, V] and k >= 1")
    num_kept = min(k, logits_RV.shape[1])
    device = logits_RV.device
    parts = [
        _top_k_of(logits_RV[first : first + _ROWS_AT_ONCE].detach(), num_kept)
        for first in range(0, len(logits_RV), _ROWS_AT_ONCE)
    ]
    if not parts:
        empty = torch.zeros(0, dtype=torch.float32, device=device)
        ids_RK = torch.zeros((0, num_kept), dtype=torch.int32, device=device)
        return AnswerLogits(ids_RK, ids_RK.half(), empty, empty.clone())
    return AnswerLogits(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def renormalized(logits: AnswerLogits) -> tuple[Tensor, Tensor]:
    """Kept and tail probabilities that sum to 1 in each row, float32: `[R, K]` and `[R]`."""
    probs_RK, tail_R = logits.logprobs_RK.float().exp(), logits.tail_logmass_R.exp()
    total_R = probs_RK.sum(-1) + tail_R
    return probs_RK / total_R[:, None], tail_R / total_R


def _top_k_of(logits_RV: Tensor, num_kept: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    exact_RV = logits_RV.double()
    log_partition_R = exact_RV.logsumexp(-1)
    if not bool(torch.isfinite(log_partition_R).all()):
        raise ValueError("a row of logits holds NaN or +inf, or no finite value; the teacher's run is broken")
    ids_RK = _top_ids(logits_RV, num_kept)
    logprobs_RK = exact_RV.gather(1, ids_RK) - log_partition_R[:, None]
    if num_kept == logits_RV.shape[1]:
        tail_R = torch.full_like(log_partition_R, -torch.inf)
    else:
        tail_R = exact_RV.scatter(1, ids_RK, -torch.inf).logsumexp(-1) - log_partition_R
    return ids_RK.int(), logprobs_RK.half(), tail_R.float(), log_partition_R.float()


def _top_ids(logits_RV: Tensor, num_kept: int) -> Tensor:
    """`[R, K]` int64: `torch.topk` leaves open which of equal logits it takes, and in which order."""
    smallest_R1 = logits_RV.topk(num_kept, dim=-1).values[:, -1:]
    above_RV, equal_RV = logits_RV > smallest_R1, logits_RV == smallest_R1
    num_wanted_R1 = num_kept - above_RV.sum(-1, keepdim=True)
    taken_RV = above_RV | (equal_RV & (equal_RV.cumsum(-1, dtype=torch.int32) <= num_wanted_R1))
    rising_ids_RK = taken_RV.nonzero()[:, 1].view(len(logits_RV), num_kept)
    order_RK = logits_RV.gather(1, rising_ids_RK).sort(dim=-1, descending=True, stable=True).indices
    return rising_ids_RK.gather(1, order_RK)
