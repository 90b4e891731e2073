"""Metrics of a training stage: one JSON object a line, and TensorBoard where it is installed."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path


class MetricsLog:
    """Appends to `metrics.jsonl` and `tensorboard/` of a stage's folder.

    Args:
        folder: the stage's folder.
        enabled: False on all ranks but the first.
    """

    def __init__(self, folder: Path, *, enabled: bool) -> None:
        self._file = (folder / "metrics.jsonl").open("a") if enabled else None
        self._board = None
        if enabled and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line, one point of each curve."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes both."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
