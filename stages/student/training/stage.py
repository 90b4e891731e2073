"""One stage of training as a value: where it reads and writes, how far it is, what it came to."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from stages.student.config import StageConfig, StageName, TrainConfig
from storage.errors import UserError
from storage.streaming.stream import Source, StreamConfig
from storage.strict_model import StrictModel
from storage.targets.store import TargetStore

REPORT_FILE = "report.json"


class StageReport(StrictModel):
    """What a finished stage did; saved as `report.json` beside its student."""

    stage: StageName
    steps: int
    samples: int
    trained_parameters: int
    seconds: float
    samples_per_s: float
    first_batch_s: float = 0.0
    """Seconds until the first data came, after the last start: loader processes began and opened the stores. 0 when
    no step was left to do by then, and in reports of versions that did not measure it."""
    wait_share: float
    """Share of the time since then that the loop waited for data."""
    losses: dict[str, float]
    """Each term, mean over the last tenth of the steps."""
    notes: tuple[str, ...] = ()

    @classmethod
    def read(cls, stage: Path) -> "StageReport":
        """The report in a finished stage's folder.

        Raises:
            UserError: it is not one of this version.
        """
        path = stage / REPORT_FILE
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors())
            raise UserError(
                f"{path} is not a stage's report as this version writes it ({wrong}); go on with the version that "
                "wrote it, or remove the file: the stage then goes on from its newest checkpoint and is saved again"
            ) from error


@dataclass(frozen=True)
class StageRun:
    """One stage with its places.

    Attributes:
        name: dpt, dft or sft.
        config: the run's settings.
        decoder: the student's pretrained language model, folder or hub id.
        initial: the student saved by the stage before; None starts from `decoder`.
        sources: what it trains on, at least one.
        output: the stage's folder.
    """

    name: StageName
    config: TrainConfig
    decoder: str
    initial: Path | None
    sources: tuple[Source, ...]
    output: Path

    @property
    def stage(self) -> StageConfig:
        """The stage's own settings."""
        return self.config.stage(self.name)

    @property
    def targets(self) -> TargetStore:
        """The first source's; all of them agree in what a student needs of the teacher."""
        return self.sources[0].targets

    @property
    def stream(self) -> StreamConfig:
        """How its samples are chosen, ordered and cut."""
        config = self.config
        return StreamConfig(
            seed=config.seed,
            shuffle_shards=config.shuffle_shards,
            batch_size=self.stage.batch_size,
            microbatch_size=config.microbatch_size,
            bucket_by_length=config.bucket_by_length,
            max_samples=self.stage.max_samples or config.max_samples,
            allow_incomplete=config.allow_incomplete,
        )


@dataclass(frozen=True)
class StepProgress:
    """What a progress bar shows after each optimizer step."""

    step: int
    num_steps: int
    samples: int
    losses: dict[str, float]


class TrainingStopped(Exception):
    """A stage saved a checkpoint and stopped, as it was asked to."""

    def __init__(self, stage: StageName, step: int) -> None:
        super().__init__(f"stopped {stage} after step {step}, which is saved")
        self.stage, self.step = stage, step
