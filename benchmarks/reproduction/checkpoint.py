"""The state of a training in one file, complete or absent, so that a killed one goes on to the same weights."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from benchmarks.reproduction.optimizer import Optimizer

_MODEL, _OPTIMIZER = "model.", "optimizer."


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: Optimizer, progress: dict[str, Any], settings: dict[str, Any]
) -> None:
    """Replaces the file at `path`."""
    tensors = {_MODEL + name: tensor for name, tensor in model.state_dict().items()}
    tensors |= {_OPTIMIZER + name: tensor for name, tensor in optimizer.tensors().items()}
    about = {"progress": json.dumps(progress), "settings": json.dumps(settings)}
    partial = path.with_name(path.name + ".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, about)
    partial.replace(path)


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: Optimizer, settings: dict[str, Any]
) -> dict[str, Any] | None:
    """Puts the state into `model` and `optimizer`; returns the progress, or None if there is no file.

    Raises:
        ValueError: If the file is of a training with other settings.
    """
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    found, expected = json.loads(about["settings"]), json.loads(json.dumps(settings))
    if found != expected:
        raise ValueError(
            f"{path} is of a training with settings {found}, this one has {expected}; "
            "give another --folder, or remove the file to begin again"
        )
    model.load_state_dict({k.removeprefix(_MODEL): v for k, v in tensors.items() if k.startswith(_MODEL)})
    optimizer.load({k.removeprefix(_OPTIMIZER): v for k, v in tensors.items() if k.startswith(_OPTIMIZER)})
    progress: dict[str, Any] = json.loads(about["progress"])
    return progress
