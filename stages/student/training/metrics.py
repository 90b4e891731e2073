"""Metrics of a training stage: one JSON object a line, TensorBoard, and Weights & Biases where that is asked for."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol
from uuid import uuid4

from pydantic import Field

from storage.errors import UserError
from storage.stores import open_store
from storage.strict_model import StrictModel

Tracker = Literal["tensorboard", "wandb"]
_WANDB_ID = "wandb-id.txt"


class LoggingConfig(StrictModel):
    """Where metrics go."""

    every: int = Field(default=10, ge=1)
    """Steps between lines of metrics.jsonl and points of the trackers' curves."""
    trackers: tuple[Tracker, ...] = ("tensorboard",)
    """Where else metrics go: tensorboard (if installed), wandb (extra `wandb`)."""


class _Curves(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class MetricsLog:
    """Appends to `metrics.jsonl` of a stage's folder, and to the curves of each tracker.

    Args:
        folder: the stage's folder.
        trackers: TensorBoard writes to `tensorboard/`, and is left out where it is not installed; Weights & Biases
            takes project, account and mode from its own environment variables and writes to `wandb/`.
        step: finished steps; what an interrupted run wrote of later ones is taken away, as they are done again.
        settings: what Weights & Biases shows as the run's config.
        enabled: False on all ranks but the first.

    Raises:
        UserError: If wandb was asked for and is not installed.
    """

    def __init__(
        self, folder: Path, trackers: tuple[Tracker, ...], step: int, settings: Mapping[str, Any], *, enabled: bool
    ) -> None:
        self._curves: list[_Curves] = []
        if not enabled:
            return
        self._curves.append(_JsonLines(folder / "metrics.jsonl", step))
        if "tensorboard" in trackers and importlib.util.find_spec("tensorboard") is not None:
            self._curves.append(_TensorBoard(folder / "tensorboard", step))
        if "wandb" in trackers:
            if importlib.util.find_spec("wandb") is None:
                raise UserError(
                    "train.logging.trackers names wandb, which is not installed; pip install 'compodistill[wandb]'"
                )
            self._curves.append(_WeightsAndBiases(folder, settings))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line, one point of each curve."""
        for curves in self._curves:
            curves.write(step, values)

    def close(self) -> None:
        """Flushes all."""
        for curves in self._curves:
            curves.close()


class _JsonLines:
    def __init__(self, path: Path, step: int) -> None:
        lines = path.read_text().splitlines() if path.exists() else []
        # The last line may have been cut by a kill.
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        open_store(path.parent).write(path.name, "".join(f"{line}\n" for line in kept).encode())
        self._file = path.open("a")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        # The id is the folder's, so that a resumed stage goes on in the same run of the tracker.
        store = open_store(folder)
        known = store.read(_WANDB_ID).decode().strip() if store.exists(_WANDB_ID) else ""
        if not known:
            known = uuid4().hex[:8]
            store.write(_WANDB_ID, known.encode())
        self._run = wandb.init(
            id=known,
            resume="allow",
            dir=str(folder),
            name=f"{folder.parent.name}/{folder.name}",
            config=dict(settings),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
