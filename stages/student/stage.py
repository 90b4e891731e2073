"""One stage of training as a value: where it reads and writes, how far it is, what it came to."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from stages.student.config import StageConfig, StageName, TrainConfig
from storage.stores import Store
from storage.targets import TargetStore


class StageReport(BaseModel):
    """What a finished stage did; saved as `report.json` beside its student."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: StageName
    steps: int
    samples: int
    trained_parameters: int
    seconds: float
    samples_per_s: float
    wait_share: float
    """Share of the time that the loop waited for data."""
    losses: dict[str, float]
    """Each term, mean over the last tenth of the steps."""
    notes: list[str] = []


@dataclass(frozen=True)
class StageRun:
    """One stage with its places.

    Attributes:
        name: dpt, dft or sft.
        config: the run's settings.
        decoder: the student's pretrained language model, folder or hub id.
        initial: the student saved by the stage before; None starts from `decoder`.
        samples, targets: what it trains on.
        output: the stage's folder.
    """

    name: StageName
    config: TrainConfig
    decoder: str
    initial: Path | None
    samples: Store
    targets: TargetStore
    output: Path

    @property
    def stage(self) -> StageConfig:
        """The stage's own settings."""
        return self.config.stage(self.name)


@dataclass(frozen=True)
class StepProgress:
    """What a progress bar shows after each optimizer step."""

    step: int
    num_steps: int
    samples: int
    losses: dict[str, float]
