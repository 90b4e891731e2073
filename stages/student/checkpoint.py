"""Training checkpoints: complete or absent, safetensors and JSON only.

A checkpoint is a folder `step-00000100` with the trained parameters, the optimizer's tensors, and `state.json`
(position in the stream, schedule, counts). It is written under another name and renamed when it is whole.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from storage.stores import open_store


@dataclass(frozen=True)
class Position:
    """How far a stage has come.

    Attributes:
        step: finished optimizer steps.
        epoch: the epoch of the next step, counted from 0.
        epoch_step: finished steps of that epoch; a step is the same slice of the global order for any number of
            ranks and any microbatch size.
        samples: samples used, over all ranks and epochs.
        seconds: training time so far.
    """

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    samples: int = 0
    seconds: float = 0.0


def save_checkpoint(
    folder: Path,
    position: Position,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    keep: int,
) -> Path:
    """Writes `folder/step-N` and removes all but the newest `keep`."""
    target = folder / f"step-{position.step:08d}"
    staging = folder / f"{target.name}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    save_file(trained_parameters(model), staging / "trained.safetensors")
    save_file(_optimizer_tensors(optimizer), staging / "optimizer.safetensors")
    save_file({"cpu": torch.get_rng_state()}, staging / "random.safetensors")
    state = {"position": asdict(position), "scheduler": scheduler.state_dict()}
    (staging / "state.json").write_text(json.dumps(state, indent=1))
    open_store(folder).put_tree(staging, target.name)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if not path.name.endswith(".partial"))


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler) -> Position:
    """Puts a checkpoint's state into a freshly built model, optimizer and schedule."""
    saved = load_file(path / "trained.safetensors")
    wanted = trained_parameters(model)
    assert saved.keys() == wanted.keys(), f"{path} was written for other trained parameters"
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(saved[name])
    _restore_optimizer(optimizer, load_file(path / "optimizer.safetensors"))
    torch.set_rng_state(load_file(path / "random.safetensors")["cpu"])
    state = json.loads((path / "state.json").read_text())
    scheduler.load_state_dict(state["scheduler"])
    # The schedule only sets the rate at its next step; until then the optimizer would use that of step 0.
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    return Position(**state["position"])


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that learn, by name; tied ones once."""
    return {name: p.data for name, p in model.named_parameters() if p.requires_grad}


def _optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {f"{index}.{name}": torch.as_tensor(value) for index, s in state.items() for name, value in s.items()}


def _restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
