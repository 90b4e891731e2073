"""What the two training commands share: optimizers and their schedule, the log, the machine in words."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import transformers
from torch import nn


class Schedule(Protocol):
    """The settings that `Optimizers` reads from a training config."""

    @property
    def adam_lr(self) -> float:
        """Highest learning rate of AdamW."""
        ...

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        ...

    @property
    def decay_from(self) -> float:
        """Share of the stage after which the rate falls linearly to a hundredth."""
        ...


class Optimizers:
    """Muon for the matrices inside the layers, AdamW for everything else, one schedule for both."""

    def __init__(self, modules: list[tuple[nn.Module, float]], muon_lr: float, schedule: Schedule) -> None:
        matrices, others = [], []
        for module, scale in modules:
            for name, parameter in module.named_parameters():
                inner = parameter.ndim == 2 and not any(w in name for w in ("embed", "lm_head", "heads."))
                (matrices if inner else others).append((parameter, scale))
        self.schedule, self.num_steps = schedule, 0
        scales = sorted({scale for _, scale in others})
        self.all = [
            torch.optim.Muon(
                [{"params": [p], "scale": s} for p, s in matrices],
                lr=muon_lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(
                [{"params": [p for p, s in others if s == scale], "scale": scale} for scale in scales],
                lr=schedule.adam_lr, betas=(0.9, 0.98), weight_decay=0.0,
            ),
        ]  # fmt: skip

    def step(self, progress: float, lr_scale: float = 1.0) -> None:
        """Take a step, at `progress` in 0..1 of the stage, and clear the gradients."""
        c = self.schedule
        self.num_steps += 1
        factor = min(1.0, self.num_steps / c.warmup_steps, max(0.01, (1 - progress) / (1 - c.decay_from)))
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = lr_scale * factor * group["scale"] * optimizer.defaults["lr"]
                nn.utils.clip_grad_norm_(group["params"], 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


class Log:
    """Running means, printed every `every` steps."""

    def __init__(self, every: int) -> None:
        self.every, self.started = every, time.monotonic()
        self.sums: dict[str, list[float]] = {}

    def add(self, group: str, **values: float) -> None:
        """Note values, by name and group."""
        for name, value in values.items():
            self.sums.setdefault(f"{name}/{group}", []).append(value)

    def show(self, stage: str, step: int, num_steps: int) -> None:
        """Print the means since the last line, when it is time."""
        if (step + 1) % self.every and step + 1 != num_steps:
            return
        means = "  ".join(f"{name} {np.mean(values):.3f}" for name, values in sorted(self.sums.items()))
        print(f"{time.monotonic() - self.started:6.0f} s  {stage} {step + 1}/{num_steps}  {means}", flush=True)
        self.sums.clear()


def machine() -> dict[str, str | int]:
    """What the run was made with."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor()
    return {
        "cpu": cpu,
        "num_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }
