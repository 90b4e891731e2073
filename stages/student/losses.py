"""The losses: attention alignment, logit distillation, next-token cross entropy, as functions of tensors.

The dense forms are the definitions; the forms over stored targets equal them when the stored targets are whole.

Shape letters: L matched layers, B samples, N image tokens, R answer rows, V vocabulary, K stored ids of a row.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from storage.codecs.answer_logits import AnswerLogits

COSINE_EPS = 1e-8


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


def logit_distillation_loss(student_RV: Tensor, teacher_RV: Tensor) -> Tensor:
    """L_kd: cross entropy of the student under the teacher's distribution, mean over answer rows, temperature 1.

    Args:
        student_RV: student logits at the rows that predict an answer token.
        teacher_RV: teacher logits of the same rows. A longer vocabulary with the same leading ids is cut to the
            student's and renormalised; a shorter one gives the student's further ids probability zero.

    Source: METHOD, "Logit KD".
    """
    teacher_probs = teacher_RV[:, : student_RV.shape[1]].float().softmax(-1)
    student_logprobs = student_RV.float().log_softmax(-1)[:, : teacher_probs.shape[1]]
    return -(teacher_probs * student_logprobs).sum(-1).mean()


def stored_logit_distillation_loss(student_RV: Tensor, stored: AnswerLogits) -> Tensor:
    """`[R]` cross entropy under stored top-k log-probabilities; the mass outside them is one bucket of its own.

    Equals `logit_distillation_loss` row by row when the teacher's whole vocabulary is stored; else it is that of the
    distribution over K + 1 events, which ignores how the mass spreads inside the tail. Ids past the student's
    vocabulary are dropped and the rest renormalised; the tail bucket is kept whole.
    """
    ids_RK = stored.ids_RK.long()
    known_RK = ids_RK < student_RV.shape[1]
    logprobs_RK = stored.logprobs_RK.float().masked_fill(~known_RK, -torch.inf)
    kept_R1 = torch.logaddexp(logprobs_RK.logsumexp(-1), stored.tail_logmass_R.float())[:, None]
    # Stored values are rounded, so the kept mass and the tail need not sum to exactly 1.
    teacher_RK = (logprobs_RK - kept_R1).exp()
    tail_R = (stored.tail_logmass_R.float() - kept_R1[:, 0]).exp()

    log_partition_R1 = student_RV.float().logsumexp(-1, keepdim=True)
    student_RK = student_RV.gather(1, ids_RK.clamp(max=student_RV.shape[1] - 1)).float() - log_partition_R1
    head_R = (teacher_RK * student_RK.masked_fill(~known_RK, 0.0)).sum(-1)
    student_head_R = student_RK.masked_fill(~known_RK, -torch.inf).logsumexp(-1)
    # log(1 - mass of the stored ids); kept off log(0) when the student puts all its mass on them.
    student_tail_R = torch.log1p(-student_head_R.exp().clamp(max=1 - 1e-6))
    return -head_R - torch.where(tail_R > 0, tail_R * student_tail_R, torch.zeros_like(tail_R))


def next_token_loss(student_RV: Tensor, answer_R: Tensor) -> Tensor:
    """`[R]` cross entropy of the answer tokens, in float32."""
    return F.cross_entropy(student_RV.float(), answer_R, reduction="none")
