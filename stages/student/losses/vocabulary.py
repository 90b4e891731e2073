"""Cross entropies and probabilities of some ids, from vocabulary logits without a float32 copy of them.

Both functions convert a bounded number of rows at a time, forward and backward.

Shape letters: R answer rows, V vocabulary, A ids of a row that have a weight.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_ROWS_AT_ONCE = 64
"""Rows of float32 vocabulary logits that exist at a time: 39 MB of a vocabulary of 152,000."""


def sparse_cross_entropy(student_RV: Tensor, ids_RA: Tensor, weights_RA: Tensor, temperature: float = 1.0) -> Tensor:
    """`[R]`: -sum_j weights[j] log q[ids[j]], q the softmax of the student's logits over the temperature.

    Args:
        student_RV: Logits, any floating type; the only argument with a gradient.
        ids_RA: int64 in `[0, V)`; an id may occur several times.
        weights_RA: Need not sum to 1. With leading axes `[..., R, A]` they give several losses over the same ids,
            `[..., R]`, at the price of one.
        temperature: Divides the logits.
    """
    loss_R: Tensor = _SparseCrossEntropy.apply(student_RV, ids_RA, weights_RA, temperature)  # type: ignore[no-untyped-call]
    return loss_R


def support_probabilities(student_RV: Tensor, ids_RA: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """`[R, A]` probabilities of the named ids, and `[R]` of all others together (0 where there is no other).

    Only the logits, of any floating type and divided by the temperature, have a gradient. The int64 ids are distinct in
    a row; one of V or more has probability 0. Both are float32 (float64 for such logits). The rest is a sum of its
    parts, so a small one has its full precision.
    """
    probs_RA, rest_R = _SupportProbabilities.apply(student_RV, ids_RA, temperature)  # type: ignore[no-untyped-call]
    return probs_RA, rest_R


class _SparseCrossEntropy(torch.autograd.Function):
    """With z the logits over the temperature: sum w * logsumexp(z) - sum w z[ids]; the gradient is sum w * q - w."""

    @staticmethod
    def forward(ctx: Any, student_RV: Tensor, ids_RA: Tensor, weights_RA: Tensor, temperature: float) -> Tensor:
        log_partition_R = _log_partition(student_RV, temperature)
        weights_RA = weights_RA.to(log_partition_R.dtype)
        ctx.save_for_backward(student_RV, ids_RA, weights_RA, log_partition_R)
        ctx.temperature = temperature
        picked_RA = _scaled(student_RV.gather(1, ids_RA), temperature)
        return (weights_RA * (log_partition_R[:, None] - picked_RA)).sum(-1)

    @staticmethod
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor, None, None, None]:
        student_RV, ids_RA, weights_RA, log_partition_R = ctx.saved_tensors
        share_RA = weights_RA * (grad_R / ctx.temperature)[..., None]
        if share_RA.ndim > 2:
            share_RA = share_RA.flatten(0, -3).sum(0)
        grad_RV = torch.empty_like(student_RV)
        for rows, probs_RV in _probabilities(student_RV, log_partition_R, ctx.temperature):
            probs_RV *= share_RA[rows].sum(-1, keepdim=True)
            grad_RV[rows] = probs_RV.scatter_add_(1, ids_RA[rows], -share_RA[rows])
        return grad_RV, None, None, None


class _SupportProbabilities(torch.autograd.Function):
    """With g the gradients and T the temperature: dq_i / dz_v = q_i (1[i = v] - q_v) / T, the rest as one more id."""

    @staticmethod
    def forward(ctx: Any, student_RV: Tensor, ids_RA: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        log_partition_R = _log_partition(student_RV, temperature)
        known_RA = ids_RA < student_RV.shape[1]
        picked_RA = _scaled(student_RV.gather(1, ids_RA.clamp(max=student_RV.shape[1] - 1)), temperature)
        probs_RA = (picked_RA - log_partition_R[:, None]).exp() * known_RA
        rest = [
            probs_RV.masked_fill_(_named(probs_RV, ids_RA[rows]), 0.0).sum(-1)
            for rows, probs_RV in _probabilities(student_RV, log_partition_R, temperature)
        ]
        rest_R = torch.cat([log_partition_R[:0], *rest])
        ctx.save_for_backward(student_RV, ids_RA, log_partition_R, probs_RA, rest_R)
        ctx.temperature = temperature
        return probs_RA, rest_R

    @staticmethod
    def backward(ctx: Any, grad_RA: Tensor, grad_rest_R: Tensor) -> tuple[Tensor, None, None]:
        student_RV, ids_RA, log_partition_R, probs_RA, rest_R = ctx.saved_tensors
        mean_R = (grad_RA * probs_RA).sum(-1) + grad_rest_R * rest_R
        # What a named id has more than all others.
        more_RA = probs_RA * (grad_RA - grad_rest_R[:, None]) / ctx.temperature
        base_R = (grad_rest_R - mean_R) / ctx.temperature
        known_ids_RA = ids_RA.clamp(max=student_RV.shape[1] - 1)
        grad_RV = torch.empty_like(student_RV)
        for rows, probs_RV in _probabilities(student_RV, log_partition_R, ctx.temperature):
            grad_RV[rows] = probs_RV.mul_(base_R[rows, None]).scatter_add_(1, known_ids_RA[rows], more_RA[rows])
        return grad_RV, None, None


def _probabilities(student_RV: Tensor, log_partition_R: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """Probabilities of some rows at a time; the caller may write to them."""
    for start in range(0, len(student_RV), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        yield rows, (_scaled(student_RV[rows], temperature) - log_partition_R[rows, None]).exp_()


def _log_partition(student_RV: Tensor, temperature: float) -> Tensor:
    blocks = torch.split(student_RV, _ROWS_AT_ONCE)
    return torch.cat([_scaled(rows_RV, temperature).logsumexp(-1) for rows_RV in blocks])


def _named(probs_RV: Tensor, ids_RA: Tensor) -> Tensor:
    """`[R, V]` bool: where an id is named."""
    num_rows, vocab = probs_RV.shape
    named_RV = torch.zeros(num_rows, vocab + 1, dtype=torch.bool, device=probs_RV.device)
    return named_RV.scatter_(1, ids_RA.clamp(max=vocab), value=True)[:, :vocab]


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return (logits if logits.dtype == torch.float64 else logits.float()) / temperature
