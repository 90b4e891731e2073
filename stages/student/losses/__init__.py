"""The losses as functions of tensors: attention alignment, logit distillation, next-token cross entropy.

The two dense definitions are here by name; the forms over stored targets, beside them in their modules, equal them when
the stored targets are whole.
"""

from stages.student.losses.attention import attention_alignment_loss
from stages.student.losses.logits import logit_distillation_loss

__all__ = ["attention_alignment_loss", "logit_distillation_loss"]
