"""The losses as functions of tensors: attention alignment, logit distillation, next-token cross entropy."""
