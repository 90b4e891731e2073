"""Settings of student training, in sections; they import no torch, so that a mistake in them is said at once."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from stages.settings import AtResume
from stages.student.data.config import LoaderConfig
from stages.student.layer_matching import MatchingConfig
from stages.student.stage_config import (
    STAGES,
    DataSource,
    DistilledFinetuning,
    DistilledPretraining,
    LoraSettings,
    StageConfig,
    StageName,
    SupervisedFinetuning,
)
from storage.strict_model import StrictModel

Strategy = Literal["ddp", "fsdp"]
Tracker = Literal["tensorboard", "wandb"]
Positions = Literal["teacher", "ordinary"]


class DataConfig(StrictModel):
    """What a run trains on, and in which order."""

    sources: Annotated[tuple[DataSource, ...], AtResume.SAME_DATA] = ()
    """Several stores at once, in place of the run's `samples` and `targets`; one order goes over all of them."""
    subset: Annotated[str | None, AtResume.SAME_DATA] = None
    """Text file with the keys of the samples to use, one a line; with `sources` each has its own."""
    max_samples: int | None = Field(default=None, ge=1)
    """Sample budget: so many different samples, drawn by `train.seed`, the same in each epoch; None uses all."""
    shuffle_shards: int = Field(default=8, ge=0)
    """Shards whose samples are mixed together; 0 keeps the stored order."""
    allow_incomplete: Annotated[bool, AtResume.MAY_CHANGE] = False
    """Train on the shards committed so far of a store whose extraction did not finish; without it such a store is
    refused. A stage that was begun so refuses to go on once the store holds other shards: its order of samples would be
    another."""


class ValidationConfig(StrictModel):
    """Samples that are held out of training, and when the loss on them is measured.

    Give one of share, keys and subset; without one, all samples are trained on.
    """

    share: float | None = Field(default=None, gt=0, lt=1)
    """About this share of the samples of each store; a sample's key alone decides, with `share_seed`."""
    share_seed: int = Field(default=0, ge=0)
    """Another one holds out other samples of that share; `train.seed` does not."""
    keys: tuple[str, ...] = ()
    """The keys of the samples to hold out, from any of the stores."""
    subset: Annotated[str | None, AtResume.SAME_DATA] = None
    """Text file with the keys of the samples to hold out, one a line."""
    every: Annotated[int, AtResume.MAY_CHANGE] = Field(default=500, ge=1)
    """Steps between two measurements; there is one more at the end of a stage."""

    @model_validator(mode="after")
    def _check_one(self) -> "ValidationConfig":
        named = {name: getattr(self, name) for name in ("share", "keys", "subset")}
        if len(given := [name for name, value in named.items() if value]) > 1:
            raise ValueError(f"expected one of {', '.join(named)}; leave out {' or '.join(given)}")
        return self


class ClusterConfig(StrictModel):
    """Training on a Ray cluster, in the processes of one group."""

    ray_address: str | None = None
    """Address of the cluster; None trains in this process, or in those that torchrun or `accelerate launch` started."""
    workers: int | None = Field(default=None, ge=1)
    """Processes of the group; None is one a GPU, or one without GPUs. Given without an address, Ray starts here."""
    max_attempts: int = Field(default=3, ge=1)
    """Times the group is started when a process or node dies; each goes on from the newest checkpoint."""


class CheckpointConfig(StrictModel):
    """When the state of training is saved."""

    every: int = Field(default=500, ge=1)
    """Steps between checkpoints."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept."""


class LoggingConfig(StrictModel):
    """Where metrics go."""

    every: int = Field(default=10, ge=1)
    """Steps between lines of metrics.jsonl and points of the trackers' curves."""
    trackers: tuple[Tracker, ...] = ("tensorboard",)
    """Where else metrics go: tensorboard (if installed), wandb (extra `wandb`)."""


class ParallelConfig(StrictModel):
    """How a step is computed, and spread over processes."""

    strategy: Annotated[Strategy, AtResume.MAY_CHANGE] = "ddp"
    """With several processes: `ddp`, a copy of the student in each; `fsdp`, a part of each parameter (FSDP2)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`bf16`: mixed precision; what learns stays float32, what is frozen is kept in bfloat16. `auto` is bf16 on a GPU
    that has it, else fp32."""
    activation_checkpointing: Annotated[bool, AtResume.MAY_CHANGE] = False
    """Activations of each decoder layer are computed again in the backward pass: less memory, a third more time."""


class TrainConfig(StrictModel):
    """How students are trained; where samples, targets, student and output lie is said beside it."""

    stages: Annotated[tuple[StageName, ...], AtResume.MAY_CHANGE] = Field(default=STAGES, min_length=1)
    """Which stages are trained, in this order. Each starts from the student of the last one before it that the run
    folder holds, the first from the decoder."""
    seed: int = Field(default=0, ge=0)
    """Of the sample order and of new weights."""
    vision: Literal["teacher", "own"] = "teacher"
    """`teacher` (teacher adapter fetching, TAF): the teacher's vision tower and projector, a post-connector, and the
    decoder named as the student. `own`: a whole multimodal checkpoint with its own tower and projector, which must make
    as many image tokens of each sample as the teacher did."""
    projector: Literal["trained", "frozen"] = "trained"
    """With `vision` own: whether the student's projector learns in every stage, or stays as it is. The tower never
    learns."""
    positions: Positions = "teacher"
    """Of image tokens in a new student's decoder. `teacher`: as the teacher's, which are 3D (time, height, width) in
    the families of Qwen-VL and GLM-4V. `ordinary`: one after another, as of text. A student that was saved before, or
    with `vision` own, keeps those that it has."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    lora: LoraSettings = LoraSettings()
    """Low-rank updates, in stages that train LoRA."""
    dpt: DistilledPretraining = DistilledPretraining()
    """Distilled pre-training."""
    dft: DistilledFinetuning = DistilledFinetuning()
    """Distilled fine-tuning."""
    sft: SupervisedFinetuning = SupervisedFinetuning()
    """Supervised fine-tuning."""
    data: DataConfig = DataConfig()
    """What is trained on, and in which order."""
    validation: ValidationConfig = ValidationConfig()
    """Samples that are held out of training, and when the loss on them is measured."""
    matching: Annotated[MatchingConfig, AtResume.IF_UNMATCHED] = MatchingConfig()
    """Which student layers learn from which teacher layers."""
    loader: Annotated[LoaderConfig, AtResume.MAY_CHANGE] = LoaderConfig()
    """How batches are made and read ahead."""
    parallel: ParallelConfig = ParallelConfig()
    """How a step is computed, and spread over processes."""
    cluster: Annotated[ClusterConfig, AtResume.MAY_CHANGE] = ClusterConfig()
    """Training on a Ray cluster."""
    checkpoint: Annotated[CheckpointConfig, AtResume.MAY_CHANGE] = CheckpointConfig()
    """When the state of training is saved."""
    logging: Annotated[LoggingConfig, AtResume.MAY_CHANGE] = LoggingConfig()
    """Where metrics go."""

    @field_validator("stages")
    @classmethod
    def _check_order(cls, stages: tuple[StageName, ...]) -> tuple[StageName, ...]:
        if list(stages) != [name for name in STAGES if name in stages]:
            raise ValueError(f"expected some of {', '.join(STAGES)}, each once and in this order")
        return stages

    def stage(self, name: StageName) -> StageConfig:
        """The settings of one stage."""
        config: StageConfig = getattr(self, name)
        return config
