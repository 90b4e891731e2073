"""Metrics of a training stage: one JSON object a line, TensorBoard, and Weights & Biases where that is asked for."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

from stages.student.training.train_config import Tracker
from storage.digests import parse_object
from storage.errors import CorruptData, UserError
from storage.regular_files import read_regular
from storage.stores import open_store

_WANDB_ID = "wandb-id.txt"
_MAX_BYTES = 2**30
"""Largest `metrics.jsonl` that is gone on with: that of about four million lines."""


Write = Callable[[int, Mapping[str, float]], None]
"""Adds the values of a step."""


@contextmanager
def metrics_log(
    folder: Path, trackers: tuple[Tracker, ...], step: int, settings: Mapping[str, Any], *, enabled: bool
) -> Iterator[Write]:
    """Opens `metrics.jsonl` of a stage's folder and the curves of each tracker; gives what writes to all of them.

    TensorBoard writes to `tensorboard/`, and is left out where it is not installed. Weights & Biases takes project,
    account and mode from its own environment variables, shows `settings` as the run's config, and writes to `wandb/`.
    What an interrupted run wrote of steps after `step` is taken away, as they are done again. One rank is `enabled`.

    Raises:
        UserError: If wandb was asked for and is not installed.
        CorruptData: If `metrics.jsonl` holds other lines.
    """
    logs = []
    if enabled:
        logs.append(_json_lines(folder / "metrics.jsonl", step))
        if "tensorboard" in trackers and find_spec("tensorboard") is not None:
            logs.append(_tensorboard(folder / "tensorboard", step))
        if "wandb" in trackers:
            if find_spec("wandb") is None:
                raise UserError(
                    "train.logging.trackers names wandb, which is not installed; pip install 'compodistill[wandb]'"
                )
            logs.append(_weights_and_biases(folder, settings))
    with ExitStack() as opened:
        writers = [opened.enter_context(log) for log in logs]

        def write(step: int, values: Mapping[str, float]) -> None:
            for one in writers:
                one(step, values)

        yield write


@contextmanager
def _json_lines(path: Path, step: int) -> Iterator[Write]:
    lines = read_regular(path, _MAX_BYTES).splitlines() if path.exists() else []
    # The last line may have been cut by a kill.
    whole = [(number, line) for number, line in enumerate(lines, 1) if line.endswith(b"}")]
    kept = [line for number, line in whole if _step_of(line, f"{path}, line {number}") <= step]
    open_store(path.parent).write(path.name, b"".join(line + b"\n" for line in kept))
    # A line is written as soon as it is whole.
    with path.open("a", buffering=1) as file:
        yield lambda step, values: print(json.dumps({"step": step, **values}), file=file)


def _step_of(line: bytes, where: str) -> int:
    todo = "remove the line, or move the file away"
    found = parse_object(line, where, todo).get("step")
    if not isinstance(found, int):
        raise CorruptData(f"{where} has step {found!r:.50}, expected a whole number; {todo}")
    return found


@contextmanager
def _tensorboard(folder: Path, step: int) -> Iterator[Write]:
    from torch.utils.tensorboard import SummaryWriter

    def write(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            curves.add_scalar(name, value, step)

    with SummaryWriter(str(folder), purge_step=step + 1) as curves:
        yield write


@contextmanager
def _weights_and_biases(folder: Path, settings: Mapping[str, Any]) -> Iterator[Write]:
    import wandb

    # The id is the folder's, so that a resumed stage goes on in the same run of the tracker.
    store = open_store(folder)
    known = store.read(_WANDB_ID).decode().strip() if store.exists(_WANDB_ID) else ""
    if not known:
        known = uuid4().hex[:8]
        store.write(_WANDB_ID, known.encode())
    name = f"{folder.parent.name}/{folder.name}"
    run = wandb.init(id=known, resume="allow", dir=str(folder), name=name, config=dict(settings))
    try:
        yield lambda step, values: run.log(dict(values), step=step)
    finally:
        run.finish()
