"""The attention losses: pooled maps of student and teacher, compared by cosine, divergence or squared difference.

Shape letters: L decoder layers that are matched, B samples, N image tokens, W windows, a answers of a sample.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.student.stage_config import AttentionLoss
from storage.codecs.sinks import sink_threshold

COSINE_EPS = 1e-8
LEAST_SHARE = 1e-12
"""`kl` clamps the student's share of attention on a key to at least this."""


def attention_alignment_loss(student_LBNN: Tensor, teacher_LBNN: Tensor, kind: AttentionLoss = "cosine") -> Tensor:
    """L_attn: the loss of pooled maps, summed over layers, mean over the batch.

    Maps are zero above the diagonal; the teacher's are the matched windows, averaged. The gradient flows to
    `student_LBNN` only through the pooled values, not through the masks. For `kind` see `matched_loss`.

    Source: docs/method.md#attention-loss
    """
    pairs = zip(student_LBNN, teacher_LBNN, strict=True)
    losses_LB = [matched_loss(a, b, below_sink_threshold(b) & (b > 0), kind=kind) for a, b in pairs]
    return torch.stack(losses_LB).sum(0).mean()


def matched_loss(
    student_BNN: Tensor,
    teacher_BNN: Tensor,
    teacher_keep_BNN: Tensor,
    num_tokens_B: Tensor | None = None,
    *,
    kind: AttentionLoss = "cosine",
    sink_mask: bool = True,
) -> Tensor:
    """`[B]` loss of one matched pair, from the teacher's map and its exact, stored sink mask.

    Let a and b be the pooled vectors of student and teacher. `cosine` is 1 - cos(a, b). `kl` is sum_j b'_j log(b'_j /
    a'_j) with a' = a / sum(a) and b' = b / sum(b). `mse` is the mean of (a_j - b_j)^2 over the sample's own N keys.
    `row_kl` pools nothing: it is `kl` of the kept entries of each query's row, mean over the queries that keep more
    than one. All are zero where a = b; `cosine` and `kl` also where a and b differ by a factor, `row_kl` where rows do.
    `mse` is of the order of 1 / N^2.

    Args:
        student_BNN: Student maps, zero beyond a sample's own number of image tokens.
        teacher_BNN: Teacher maps, padded in the same way.
        teacher_keep_BNN: Bool, True where the teacher's entry is positive and no sink; False in the padding.
        num_tokens_B: Image tokens of each sample; None when every map is full. A sample with 0 gives 0.
        kind: How they are compared.
        sink_mask: False keeps the student's sinks; the teacher's stay where `teacher_keep_BNN` is True.
    """
    keep_BNN = teacher_keep_BNN
    if sink_mask:
        keep_BNN = keep_BNN & below_sink_threshold(student_BNN.detach(), num_tokens_B)
    teacher_BNN = teacher_BNN.to(student_BNN.dtype)
    if kind == "row_kl":
        loss_B = _row_divergence(student_BNN, teacher_BNN, keep_BNN)
    else:
        student_BN, teacher_BN = pool_keys(student_BNN, keep_BNN), pool_keys(teacher_BNN, keep_BNN)
        count_B = student_BN.shape[-1] if num_tokens_B is None else num_tokens_B.clamp(min=1)
        loss_B = _compared(student_BN, teacher_BN, kind, count_B)
    return loss_B if num_tokens_B is None else loss_B * (num_tokens_B > 0)


def answer_loss(
    student_WaN: Tensor, teacher_WaN: Tensor, *, kind: AttentionLoss = "cosine", sink_mask: bool = True
) -> Tensor:
    """`[W, a]` loss of each matched pair and answer of one sample, from mean attention to its image tokens.

    A token is left out where the teacher's value is 0, and with `sink_mask` where one of the two is above the mean +
    std of its vector's N values. What is left is compared as `matched_loss` compares pooled vectors; of one vector,
    `row_kl` is `kl`. Which tokens are left is constant for the gradient.

    Source: docs/method.md#answer-attention
    """
    teacher_WaN = teacher_WaN.to(student_WaN.dtype)
    keep_WaN = teacher_WaN > 0
    if sink_mask:
        for values_WaN in (student_WaN.detach(), teacher_WaN):
            keep_WaN &= values_WaN <= sink_threshold(values_WaN, values_WaN.shape[-1])[..., None]
    return _compared(student_WaN * keep_WaN, teacher_WaN * keep_WaN, kind, student_WaN.shape[-1])


def _compared(student: Tensor, teacher: Tensor, kind: AttentionLoss, count: Tensor | int) -> Tensor:
    """`[...]` loss of vectors `[..., N]`, of which `count` tokens count."""
    if kind == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=-1, eps=COSINE_EPS)
    if kind == "mse":
        return (student - teacher).square().sum(-1) / count
    return _divergence(student, teacher)


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

    Source: docs/method.md#attention-loss, symbols a and b
    """
    return (map_BNN * keep_BNN).sum(-2) / keep_BNN.sum(-2).clamp(min=1)


def _row_divergence(student_BNN: Tensor, teacher_BNN: Tensor, keep_BNN: Tensor) -> Tensor:
    """`[B]` divergence of each query's kept keys, mean over the queries that have more than one.

    Source: docs/method.md#attention-loss, `row_kl`
    """
    counted_BN = keep_BNN.sum(-1) > 1
    divergence_BN = _divergence(student_BNN * keep_BNN, teacher_BNN * keep_BNN)
    return (divergence_BN * counted_BN).sum(-1) / counted_BN.sum(-1).clamp(min=1)


def _divergence(student_BN: Tensor, teacher_BN: Tensor) -> Tensor:
    """`[...]` KL divergence of the teacher's shares from the student's, over the last dimension."""
    tiny = torch.finfo(student_BN.dtype).tiny
    own_BN, wanted_BN = (pooled / pooled.sum(-1, keepdim=True).clamp(min=tiny) for pooled in (student_BN, teacher_BN))
    return (torch.xlogy(wanted_BN, wanted_BN) - wanted_BN * own_BN.clamp(min=LEAST_SHARE).log()).sum(-1)
