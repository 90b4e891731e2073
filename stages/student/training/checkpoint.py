"""Training checkpoints: complete or absent, safetensors and JSON only.

A checkpoint is a folder `step-00000100` with the trained parameters, the optimizer's tensors under the parameters'
names, and `state.json` (position in the stream, schedule, sha256 of the other files). Tensors are stored whole, however
many processes hold a part of each, so that a stage may go on with another number of processes. There is no random
state: what a step draws follows from its number.
"""

import json
import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import ConfigDict, Field, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from stages.student.training.parallel import gathered, part_like
from storage.digests import digest_of, file_sha256, parse_object
from storage.errors import CorruptData, FingerprintMismatch, StoreUnavailable, UserError, disk_errors_named
from storage.regular_files import read_regular
from storage.stores import open_store

logger = logging.getLogger(__name__)

TRAINED, OPTIMIZER, STATE = "trained.safetensors", "optimizer.safetensors", "state.json"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter."""
_REMOVE = "remove it to go on from the one before"


_Count = Annotated[int, Field(ge=0, lt=2**62)]


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
        validation, validated_step: each loss term on the held-out samples when it was last measured, and after which
            step; 0 is not yet.
        validation_seconds: the part of `seconds` in which it was measured.
        answer_rows, kd_rows, uncompared: answer rows of these samples, those of them whose logits were compared, and
            samples that had rows and none of these.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    step: _Count = 0
    epoch: _Count = 0
    epoch_step: _Count = 0
    samples: _Count = 0
    seconds: float = 0.0
    loss_sums: dict[str, float] = field(default_factory=dict)
    num_summed: _Count = 0
    validation: dict[str, float] = field(default_factory=dict)
    validated_step: _Count = 0
    validation_seconds: float = 0.0
    answer_rows: _Count = 0
    kd_rows: _Count = 0
    uncompared: _Count = 0

    def after_step(self, samples: int, answer_rows: int, kd_rows: int, uncompared: int) -> "Position":
        """One step further, in which there were so many of each."""
        return replace(
            self,
            step=self.step + 1,
            samples=self.samples + samples,
            answer_rows=self.answer_rows + answer_rows,
            kd_rows=self.kd_rows + kd_rows,
            uncompared=self.uncompared + uncompared,
        )


_POSITION = TypeAdapter(Position)


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
        FingerprintMismatch: If other parameters were trained then, or of other shapes.
    """
    wanted = trained_parameters(model)
    if differing := sorted(tensors.keys() ^ wanted.keys()):
        raise FingerprintMismatch(
            f"{len(tensors)} parameters were trained so far, {len(wanted)} are to be trained now; {len(differing)} "
            f"differ, such as {differing[0]}. A version that chose others began this stage: train it in a new folder"
        )
    if shapes := [name for name, parameter in wanted.items() if tensors[name].shape != parameter.shape]:
        found, expected = list(tensors[shapes[0]].shape), list(wanted[shapes[0]].shape)
        raise FingerprintMismatch(f"{shapes[0]} had shape {found} so far, now it has {expected}: train in a new folder")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(part_like(tensors[name], parameter))


def _damaged_file(path: Path) -> str | None:
    try:
        state = _read_state(path)
        if state.pop("digest", None) != digest_of(state):
            return f"{STATE} has another digest than it says"
        said = state.get("sha256")
        for name in (TRAINED, OPTIMIZER):
            if not isinstance(said, dict) or file_sha256(path / name) != said.get(name):
                return f"{name} has another sha256 than {STATE} says"
    except (CorruptData, OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _read_state(path: Path) -> dict[str, Any]:
    return parse_object(read_regular(path / STATE), str(path / STATE), _REMOVE)


def _restore(path: Path, state: TrainerState) -> Position:
    """Everything of a checkpoint whose digests are right; who made them may have written anything.

    Raises:
        FingerprintMismatch: If other parameters were trained then.
        CorruptData: If it is not the state of this trainer.
    """
    try:
        load_trained(state.model, load_file(path / TRAINED))
        _load_moments(load_file(path / OPTIMIZER), state)
        written = _read_state(path)
        _load_schedule(written["scheduler"], state)
        return _POSITION.validate_python(written["position"])
    except FingerprintMismatch as error:
        raise FingerprintMismatch(f"{path}: {error}") from error
    except (SafetensorError, KeyError, ValueError) as error:
        found = f"{path} is not the state of this stage ({type(error).__name__}: {error})"
        raise CorruptData(f"{found}; {_REMOVE}") from error


def _load_moments(tensors: dict[str, Tensor], state: TrainerState) -> None:
    parameters = trained_parameters(state.model)
    # One that never had a gradient has none.
    of_parameters = {name.rpartition(".")[0] for name in tensors}
    if wrong := tensors.keys() ^ {f"{name}.{key}" for name in of_parameters for key in _MOMENTS}:
        raise ValueError(f"{OPTIMIZER} holds, or lacks, {min(wrong)}")
    for name, value in tensors.items():
        parameter_name, _, key = name.rpartition(".")
        parameter = parameters[parameter_name]
        # The count of steps is a number; all else has the parameter's shape and is spread as it is.
        if value.shape != (() if key == "step" else parameter.shape):
            raise ValueError(f"{name} has shape {list(value.shape)}")
        state.optimizer.state[parameter][key] = part_like(value, parameter) if value.dim() else value


def _load_schedule(found: Any, state: TrainerState) -> None:
    own = state.scheduler.state_dict()
    # Of those of another version of torch, only what this one knows.
    known = {name: found[name] for name in own if name in found}
    if wrong := [name for name, value in known.items() if not _is_like(value, own[name])]:
        raise ValueError(f"scheduler.{wrong[0]} is {known[wrong[0]]!r:.100}")
    state.scheduler.load_state_dict(known)
    # The schedule only sets the rate at its next step; until then the optimizer would use that of step 0.
    for group, rate in zip(state.optimizer.param_groups, state.scheduler.get_last_lr(), strict=True):
        group["lr"] = rate


def _is_like(found: Any, own: Any) -> bool:
    """Whether a value of JSON has the type of one of ours, in lists too."""
    if isinstance(own, list):
        return isinstance(found, list) and len(found) == len(own) and all(map(_is_like, found, own))
    return type(found) in ((int, float) if isinstance(own, float) else (type(own),))
