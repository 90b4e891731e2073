"""Training checkpoints: complete or absent, safetensors and JSON only.

A checkpoint is a folder `step-00000100` with the trained parameters, the optimizer's tensors under the parameters'
names, and `state.json` (position in the stream, schedule, sha256 of the other files). Tensors are stored whole, however
many processes hold a part of each, so that a stage may go on with another number of processes. There is no random
state: what a step draws follows from its number.
"""

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from stages.student.training.parallel import gathered, part_like
from storage.digests import digest_of, file_sha256
from storage.errors import CorruptData, FingerprintMismatch, StoreUnavailable, UserError, disk_errors_named
from storage.regular_files import read_regular
from storage.stores import open_store
from storage.strict_model import StrictModel

logger = logging.getLogger(__name__)

TRAINED, OPTIMIZER, STATE = "trained.safetensors", "optimizer.safetensors", "state.json"


class CheckpointConfig(StrictModel):
    """When the state of training is saved."""

    every: int = Field(default=500, ge=1)
    """Steps between checkpoints."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept."""


@dataclass(frozen=True)
class Position:
    """How far a stage is.

    Attributes:
        step: finished optimizer steps.
        epoch: the epoch of the next step, counted from 0.
        epoch_step: finished steps of that epoch; a step is the same slice of the global order for any number of
            ranks and any microbatch size.
        samples, seconds: samples used, over all ranks and epochs, and training time so far.
        loss_sums, num_summed: each loss term summed over the finished ones of the last steps, which the stage's report
            is about, and how many these are.
    """

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    samples: int = 0
    seconds: float = 0.0
    loss_sums: dict[str, float] = field(default_factory=dict)
    num_summed: int = 0


@dataclass(frozen=True)
class TrainerState:
    """What learns and how it is made to learn; a checkpoint holds the state of all three."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler


class Checkpoints:
    """The checkpoints of one stage: the newest `keep` whole ones stay, at least 1; one process alone has `write`."""

    def __init__(self, folder: Path, keep: int, *, write: bool = True) -> None:
        self._folder, self._keep, self._write = folder, keep, write
        self._damaged: set[str] = set()

    def save(self, position: Position, state: TrainerState) -> None:
        """Writes `step-N`, then removes older ones, and the damaged ones that `restore` met.

        All processes must call this: parts of a tensor are gathered from all.

        Raises:
            StoreUnavailable: If the disk is full or cannot be written; earlier checkpoints stay as they are.
        """
        parameters = trained_parameters(state.model)
        moments = {
            f"{name}.{key}": torch.as_tensor(value)
            for name, parameter in parameters.items()
            for key, value in state.optimizer.state.get(parameter, {}).items()
        }
        contents = {TRAINED: gathered(parameters, wanted=self._write), OPTIMIZER: gathered(moments, wanted=self._write)}
        if not self._write:
            return
        store, name = open_store(self._folder), f"step-{position.step:08d}"
        try:
            with disk_errors_named(self._folder / name), store.new_tree(name) as folder:
                for file, tensors in contents.items():
                    save_file(tensors, folder / file)
                written = {
                    "position": asdict(position),
                    "scheduler": state.scheduler.state_dict(),
                    "sha256": {file: file_sha256(folder / file) for file in contents},
                }
                (folder / STATE).write_text(json.dumps({**written, "digest": digest_of(written)}, indent=1))
        except StoreUnavailable as error:
            before = [path for path in list_checkpoints(self._folder) if path.name not in self._damaged]
            kept = f"the newest one, {before[-1]}, is whole" if before else "there is none before it"
            raise StoreUnavailable(f"the checkpoint of step {position.step} was not saved; {kept}: {error}") from error
        # A damaged one would count as one of the newest.
        for damaged in self._damaged - {name}:
            store.remove_tree(damaged)
        self._damaged.clear()
        for old in list_checkpoints(self._folder)[: -self._keep]:
            store.remove_tree(old.name)

    def restore(self, state: TrainerState) -> Position:
        """Loads the newest whole checkpoint into a freshly built state; without one, the stage starts at step 0.

        Raises:
            UserError: If there are checkpoints, but all are damaged.
        """
        found = list_checkpoints(self._folder)
        for path in reversed(found):
            if damaged := _damaged_file(path):
                logger.warning("checkpoint %s is damaged (%s); going on from the one before", path, damaged)
                self._damaged.add(path.name)
                continue
            return _restore(path, state)
        if found:
            wrong = f"all {len(found)} checkpoints in {self._folder} are damaged"
            raise UserError(f"{wrong}; remove it to train from the start")
        return Position()


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder that are whole, oldest first."""
    return sorted(path for path in folder.glob("step-*") if not path.name.endswith(".partial"))


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name, tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_trained(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Puts whole tensors, as `gathered` gives them, into the parameters that learn.

    Raises:
        FingerprintMismatch: If other parameters were trained then.
    """
    wanted = trained_parameters(model)
    if differing := sorted(tensors.keys() ^ wanted.keys()):
        raise FingerprintMismatch(
            f"{len(tensors)} parameters were trained so far, {len(wanted)} are to be trained now; {len(differing)} "
            f"differ, such as {differing[0]}. A version that chose others began this stage: train it in a new folder"
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(part_like(tensors[name], parameter))


def _damaged_file(path: Path) -> str | None:
    try:
        state = json.loads(read_regular(path / STATE))
        if state.pop("digest") != digest_of(state):
            return f"{STATE} has another digest than it says"
        for name, digest in state["sha256"].items():
            if file_sha256(path / name) != digest:
                return f"{name} has another sha256 than {STATE} says"
    except (CorruptData, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _restore(path: Path, state: TrainerState) -> Position:
    load_trained(state.model, load_file(path / TRAINED))
    parameters = trained_parameters(state.model)
    for name, value in load_file(path / OPTIMIZER).items():
        parameter_name, key = name.rsplit(".", 1)
        parameter = parameters[parameter_name]
        # The count of steps is a number; all else has the parameter's shape and is spread as it is.
        state.optimizer.state[parameter][key] = part_like(value, parameter) if value.dim() else value
    written = json.loads(read_regular(path / STATE))
    state.scheduler.load_state_dict(written["scheduler"])
    # The schedule only sets the rate at its next step; until then the optimizer would use that of step 0.
    for group, rate in zip(state.optimizer.param_groups, state.scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    return Position(**written["position"])
