"""The losses: attention alignment, logit distillation, next-token cross entropy, as functions of tensors.

The dense forms are the definitions; the forms over stored targets equal them when the stored targets are whole.

Shape letters: L matched layers, B samples, N image tokens, R answer rows, V vocabulary, K stored ids of a row,
J ids of a row that have a weight.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from storage.codecs.answer_logits import AnswerLogits

COSINE_EPS = 1e-8
_ROWS_AT_ONCE = 64
"""Rows of float32 vocabulary logits that exist at a time: 39 MB of a vocabulary of 152,000."""


def attention_alignment_loss(student_LBNN: Tensor, teacher_LBNN: Tensor) -> Tensor:
    """L_attn: one minus the cosine of pooled maps, summed over layers, mean over the batch.

    Args:
        student_LBNN: student maps, float32, zero above the diagonal.
        teacher_LBNN: the matched teacher maps (windows already averaged).

    Returns:
        Scalar. The gradient flows to `student_LBNN` only through the pooled values, not through the masks.

    Source: METHOD, "VAT".
    """
    pairs = zip(student_LBNN, teacher_LBNN, strict=True)
    losses_LB = [pooled_cosine_loss(a, b, below_sink_threshold(b) & (b > 0)) for a, b in pairs]
    return torch.stack(losses_LB).sum(0).mean()


def pooled_cosine_loss(
    student_BNN: Tensor, teacher_BNN: Tensor, teacher_keep_BNN: Tensor, num_tokens_B: Tensor | None = None
) -> Tensor:
    """`[B]` loss of one matched pair, from the teacher's map and its own (exact, stored) sink mask.

    Args:
        student_BNN: student maps, zero beyond a sample's own number of image tokens.
        teacher_BNN: teacher maps, padded likewise.
        teacher_keep_BNN: bool, True where the teacher's entry is positive and no sink; False in the padding.
        num_tokens_B: image tokens of each sample; None when every map is full. A sample with 0 gives 0.
    """
    keep_BNN = teacher_keep_BNN & below_sink_threshold(student_BNN.detach(), num_tokens_B)
    student_BN = pool_keys(student_BNN, keep_BNN)
    teacher_BN = pool_keys(teacher_BNN, keep_BNN)
    loss_B = 1 - F.cosine_similarity(student_BN, teacher_BN, dim=-1, eps=COSINE_EPS)
    return loss_B if num_tokens_B is None else loss_B * (num_tokens_B > 0)


def below_sink_threshold(map_BNN: Tensor, num_tokens_B: Tensor | None = None) -> Tensor:
    """True where an entry is at most mean + std of its map, zeros above the diagonal included, N*N-1 in the std."""
    if num_tokens_B is None:
        num_tokens_B = torch.full(map_BNN.shape[:1], map_BNN.shape[-1], device=map_BNN.device)
    inside_BN = torch.arange(map_BNN.shape[-1], device=map_BNN.device) < num_tokens_B[:, None]
    count_B11 = num_tokens_B[:, None, None].float() ** 2
    mean_B11 = map_BNN.sum((-2, -1), keepdim=True) / count_B11.clamp(min=1)
    deviation_BNN = (map_BNN - mean_B11) * (inside_BN[:, :, None] & inside_BN[:, None, :])
    variance_B11 = deviation_BNN.square().sum((-2, -1), keepdim=True) / (count_B11 - 1).clamp(min=1)
    return map_BNN <= mean_B11 + variance_B11.sqrt()


def pool_keys(map_BNN: Tensor, keep_BNN: Tensor) -> Tensor:
    """`[B, N]` mean attention each key receives over the queries where `keep_BNN` holds; 0 for a column without any.

    Source: METHOD, "VAT", symbols a and b.
    """
    return (map_BNN * keep_BNN).sum(-2) / keep_BNN.sum(-2).clamp(min=1)


def logit_distillation_loss(student_RV: Tensor, teacher_RV: Tensor, temperature: float = 1.0) -> Tensor:
    """L_kd: cross entropy of the student under the teacher's distribution, mean over answer rows.

    Args:
        student_RV: student logits at the rows that predict an answer token.
        teacher_RV: teacher logits of the same rows. A longer vocabulary with the same leading ids is cut to the
            student's and renormalised; a shorter one gives the student's further ids probability zero.
        temperature: divides the logits of both. Gradients shrink as its square; the loss is not scaled up for it.

    Source: METHOD, "Logit KD".
    """
    teacher_probs = (teacher_RV[:, : student_RV.shape[1]].float() / temperature).softmax(-1)
    student_logprobs = (student_RV.float() / temperature).log_softmax(-1)[:, : teacher_probs.shape[1]]
    return -(teacher_probs * student_logprobs).sum(-1).mean()


def stored_logit_distillation_loss(student_RV: Tensor, stored: AnswerLogits, temperature: float = 1.0) -> Tensor:
    """`[R]` cross entropy under the teacher's whole distribution: stored ids exactly, all others by stored draws.

    Equals `logit_distillation_loss` row by row when the teacher's whole vocabulary is stored, to the rounding of the
    codec. Else loss and gradient equal it in expectation over the draws (`encode_logits` states the variance): the
    gradient for a student that equals its teacher is zero in expectation, not row by row.

    A vocabulary longer than the teacher's: the further ids have probability zero. A shorter one: kept ids past it are
    left out and the rest renormalised; so are draws past it, but the tail's stored mass stays whole, for its share
    past the student's end is not known. The expected gradient then has the dense one's direction, and (1 - p) of its
    length, where p is that share of the renormalised mass: next to nothing for ids that merely pad the teacher's.

    Args:
        student_RV: student logits, any floating type; summed in float32 (float64 stays).
        stored: the teacher's decoded records of the same rows.
        temperature: 1 or one of the stored ones; divides the logits of both.

    Raises:
        ValueError: for a temperature that was not stored.
    """
    kept_RK, tail_R, draws_RD = stored.probabilities(temperature)
    ids_RJ = torch.cat([stored.ids_RK, stored.draw_ids_RD], dim=1)
    known_RJ = ids_RJ < student_RV.shape[1]
    kept_mass_R = (kept_RK * known_RJ[:, : kept_RK.shape[1]]).sum(-1)
    weights_RJ = torch.cat([kept_RK, draws_RD], dim=1).masked_fill(~known_RJ, 0.0)
    # A row of which the student knows no token at all has no loss, rather than a division by zero.
    total_R1 = (kept_mass_R + tail_R)[:, None].clamp(min=torch.finfo(kept_RK.dtype).tiny)
    return sparse_cross_entropy(
        student_RV, ids_RJ.clamp(max=student_RV.shape[1] - 1), weights_RJ / total_R1, temperature
    )


def next_token_loss(student_RV: Tensor, answer_R: Tensor) -> Tensor:
    """`[R]` cross entropy of the answer tokens, in float32."""
    return sparse_cross_entropy(student_RV, answer_R[:, None], student_RV.new_ones((len(answer_R), 1)).float())


def sparse_cross_entropy(student_RV: Tensor, ids_RJ: Tensor, weights_RJ: Tensor, temperature: float = 1.0) -> Tensor:
    """`[R]`: -sum_j weights[j] log q[ids[j]], q the softmax of the student's logits over the temperature.

    No copy of all logits is made, nor kept for the gradient: both directions convert a bounded number of rows.

    Args:
        student_RV: logits, any floating type; the only argument with a gradient.
        ids_RJ: int64 in `[0, V)`; an id may come several times.
        weights_RJ: need not sum to 1.
        temperature: see above.
    """
    loss_R: Tensor = _SparseCrossEntropy.apply(student_RV, ids_RJ, weights_RJ, temperature)  # type: ignore[no-untyped-call]
    return loss_R


class _SparseCrossEntropy(torch.autograd.Function):
    """With z the logits over the temperature: sum w * logsumexp(z) - sum w z[ids]; the gradient is sum w * q - w."""

    @staticmethod
    def forward(ctx: Any, student_RV: Tensor, ids_RJ: Tensor, weights_RJ: Tensor, temperature: float) -> Tensor:
        sums = [_scaled(rows_RV, temperature).logsumexp(-1) for rows_RV in torch.split(student_RV, _ROWS_AT_ONCE)]
        log_partition_R = torch.cat(sums)
        weights_RJ = weights_RJ.to(log_partition_R.dtype)
        ctx.save_for_backward(student_RV, ids_RJ, weights_RJ, log_partition_R)
        ctx.temperature = temperature
        picked_RJ = _scaled(student_RV.gather(1, ids_RJ), temperature)
        return (weights_RJ * (log_partition_R[:, None] - picked_RJ)).sum(-1)

    @staticmethod
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor, None, None, None]:
        student_RV, ids_RJ, weights_RJ, log_partition_R = ctx.saved_tensors
        share_RJ = weights_RJ * (grad_R / ctx.temperature)[:, None]
        grad_RV = torch.empty_like(student_RV)
        for start in range(0, len(student_RV), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            probs_RV = (_scaled(student_RV[rows], ctx.temperature) - log_partition_R[rows, None]).exp_()
            probs_RV *= share_RJ[rows].sum(-1, keepdim=True)
            grad_RV[rows] = probs_RV.scatter_add_(1, ids_RJ[rows], -share_RJ[rows])
        return grad_RV, None, None, None


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return (logits if logits.dtype == torch.float64 else logits.float()) / temperature
