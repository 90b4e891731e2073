"""The losses as functions of tensors: attention alignment, logit distillation, next-token cross entropy.

The dense forms are the definitions; the forms over stored targets equal them when the stored targets are whole.
"""

from stages.student.losses.attention import (
    AttentionLoss,
    attention_alignment_loss,
    below_sink_threshold,
    matched_loss,
    pool_keys,
)
from stages.student.losses.head import answer_losses
from stages.student.losses.logits import (
    Divergence,
    TeacherRows,
    logit_distillation_loss,
    next_token_loss,
    teacher_rows,
)
from stages.student.losses.vocabulary import sparse_cross_entropy, support_probabilities

__all__ = [
    "AttentionLoss",
    "Divergence",
    "TeacherRows",
    "answer_losses",
    "attention_alignment_loss",
    "below_sink_threshold",
    "logit_distillation_loss",
    "matched_loss",
    "next_token_loss",
    "pool_keys",
    "sparse_cross_entropy",
    "support_probabilities",
    "teacher_rows",
]
