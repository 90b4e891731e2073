"""One stage of training as a value: what is trained, on what, and where it is saved."""

from dataclasses import dataclass
from pathlib import Path

from stages.student.run_folder import StageFolder
from stages.student.stage_config import StageConfig, StageName
from stages.student.training.objective import DistillationObjective
from stages.student.training.train_config import TrainConfig
from storage.streaming.held_out import HeldOut
from storage.streaming.source_checks import read_keys
from storage.streaming.stream import Source, StreamConfig
from storage.targets.store import TargetStore


@dataclass(frozen=True)
class StageRun:
    """One stage of a training run.

    Attributes:
        name: dpt, dft or sft.
        config: the run's settings.
        decoder: the student's pretrained language model, folder or hub id.
        initial: the student saved by the stage before; None starts from `decoder`.
        sources: what it trains on, at least one.
        output: the stage's folder.
        objective: what computes the losses of a batch; another than the product's is for comparisons.
    """

    name: StageName
    config: TrainConfig
    decoder: str
    initial: Path | None
    sources: tuple[Source, ...]
    output: Path
    objective: type[DistillationObjective] = DistillationObjective

    @property
    def stage(self) -> StageConfig:
        """The stage's own settings."""
        return self.config.stage(self.name)

    @property
    def folder(self) -> StageFolder:
        """What lies in `output`."""
        return StageFolder(self.output)

    @property
    def targets(self) -> TargetStore:
        """The target store of the first source; all of them agree in what a student needs of the teacher."""
        return self.sources[0].targets

    @property
    def stream(self) -> StreamConfig:
        """How its samples are chosen, ordered and cut."""
        config = self.config
        return StreamConfig(
            seed=config.seed,
            shuffle_shards=config.data.shuffle_shards,
            batch_size=self.stage.batch_size,
            microbatch_size=config.loader.microbatch_size,
            bucket_by_length=config.loader.bucket_by_length,
            max_samples=self.stage.max_samples or config.data.max_samples,
            allow_incomplete=config.data.allow_incomplete,
        )

    @property
    def validation_subset(self) -> Path | None:
        """The list of samples to hold out, where it is a file."""
        path = self.stage.validation_subset or self.config.validation.subset
        return None if path is None else Path(path)

    @property
    def held_out(self) -> HeldOut | None:
        """Which samples are held out of training; None trains on all.

        Raises:
            UserError: If they are listed in a file that cannot be read.
        """
        config, own = self.config.validation, self.stage.validation_subset
        if (path := self.validation_subset) is not None:
            section = "train.validation.subset" if own is None else f"train.{self.name}.validation_subset"
            return HeldOut(f"{section} ({path})", keys=read_keys(path))
        if config.share is not None:
            return HeldOut(f"train.validation.share {config.share:g}", config.share, config.share_seed)
        return HeldOut("train.validation.keys", keys=frozenset(config.keys)) if config.keys else None


class TrainingStopped(Exception):
    """A stage saved a checkpoint and stopped, as it was asked to."""

    def __init__(self, stage: StageName, step: int) -> None:
        super().__init__(f"stopped {stage} after step {step}, which is saved")
        self.stage, self.step = stage, step
