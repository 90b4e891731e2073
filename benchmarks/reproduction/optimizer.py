"""One schedule for two optimizers: Muon for the matrices inside the layers, AdamW for everything else."""

import torch
from torch import nn

WARMUP_STEPS = 50
DECAY_FROM = 0.6
"""Share of the steps after which the rates fall linearly to a hundredth."""
MUON_LR, ADAM_LR = 8e-3, 2e-3


class Optimizer:
    """Steps all parameters of a module that want a gradient."""

    def __init__(self, module: nn.Module, num_steps: int, rate: float = 1.0) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                inner = parameter.ndim == 2 and not any(part in name for part in ("embed", "head"))
                (matrices if inner else others).append(parameter)
        self.num_steps, self.rate = num_steps, rate
        self.parameters = [*matrices, *others]
        self.parts = [
            torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def step(self, step: int) -> None:
        """Takes step number `step`, from 0, and clears the gradients."""
        left = (1 - step / self.num_steps) / (1 - DECAY_FROM)
        factor = min(1.0, (step + 1) / WARMUP_STEPS, max(0.01, left))
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part, highest in zip(self.parts, (MUON_LR, ADAM_LR), strict=True):
            for group in part.param_groups:
                group["lr"] = self.rate * factor * highest
            part.step()
            part.zero_grad(set_to_none=True)
