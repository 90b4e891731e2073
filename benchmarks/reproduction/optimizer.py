"""Two optimizers under one schedule: Muon for the matrices inside the layers, AdamW for everything else."""

import torch
from torch import Tensor, nn

WARMUP_STEPS = 50
LOWEST = 0.01
"""Factor on the rates in the last step."""
MUON_LR, ADAM_LR = 8e-3, 2e-3


def rate_factor(step: int, falls_at: int, fall_steps: int) -> float:
    """Rises over the first steps, stays, and falls linearly over `fall_steps` from step `falls_at` on."""
    left = (falls_at + fall_steps - step) / max(1, fall_steps)
    return min(1.0, (step + 1) / WARMUP_STEPS, max(LOWEST, left))


class Optimizer:
    """Steps all parameters of a module that want a gradient."""

    def __init__(self, module: nn.Module) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                inner = parameter.ndim == 2 and not any(part in name for part in ("embed", "head"))
                (matrices if inner else others).append(parameter)
        self.parameters = [*matrices, *others]
        self.parts = [
            torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def step(self, factor: float) -> None:
        """Takes a step at `factor` times the rates, and clears the gradients."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part, highest in zip(self.parts, (MUON_LR, ADAM_LR), strict=True):
            for group in part.param_groups:
                group["lr"] = factor * highest
            part.step()
            part.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """What both keep of each parameter, as `PART.PARAMETER.NAME`."""
        return {
            f"{at}.{index}.{name}": value
            for at, part in enumerate(self.parts)
            for index, of_parameter in part.state_dict()["state"].items()
            for name, value in of_parameter.items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Goes on from what `tensors` gave."""
        for at, part in enumerate(self.parts):
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                of_part, index, name = key.split(".")
                if int(of_part) == at:
                    state.setdefault(int(index), {})[name] = value
            part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})
