"""Settings of student training; defaults are the published recipe (METHOD, "The three stages")."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

StageName = Literal["dpt", "dft", "sft"]


class LoraSettings(BaseModel):
    """Low-rank adaptation of the decoder's linear layers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(default=128, ge=1)
    """Rank of each update; higher learns more and costs memory."""
    alpha: int = Field(default=256, ge=1)
    """Scale of the update is alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the update's input."""


class StageConfig(BaseModel):
    """One stage of training; its subclasses hold the published settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trains: Literal["post_connector", "lora", "full"]
    """What learns: the post-connector alone, LoRA on the decoder with it, or the whole decoder with it."""
    batch_size: int = Field(ge=1)
    """Samples of an optimizer step, over all ranks and accumulation steps."""
    lm_weight: float = Field(default=1.0, ge=0)
    """Weight of the next-token cross entropy on the answers."""
    kd_weight: float = Field(default=1.0, ge=0)
    """Weight of the cross entropy under the teacher's answer distribution; 0 leaves it out."""
    kd_temperature: float = Field(default=1.0, gt=0)
    """Divides the logits of both in that term; one the target store holds. Its gradient shrinks as the square of it."""
    attention_weight: float = Field(default=1.0, ge=0)
    """Weight of the alignment with the teacher's visual attention; 0 leaves it out, and the maps unread."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak of the cosine schedule."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the samples."""
    max_steps: int | None = Field(default=None, ge=1)
    """Ends the stage (and its learning-rate schedule) early."""
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""
    samples: str | None = None
    """Sample shards of this stage, when not those of the run."""
    targets: str | None = None
    """Target store of this stage, when not that of the run."""


class DistilledPretraining(StageConfig):
    """DPT: captions, post-connector only, LM + KD."""

    trains: Literal["post_connector", "lora", "full"] = "post_connector"
    batch_size: int = Field(default=256, ge=1)
    attention_weight: float = Field(default=0.0, ge=0)


class DistilledFinetuning(StageConfig):
    """DFT: instructions, LoRA, LM + KD + attention."""

    trains: Literal["post_connector", "lora", "full"] = "lora"
    batch_size: int = Field(default=128, ge=1)


class SupervisedFinetuning(StageConfig):
    """SFT: instructions, LoRA, LM."""

    trains: Literal["post_connector", "lora", "full"] = "lora"
    batch_size: int = Field(default=192, ge=1)
    kd_weight: float = Field(default=0.0, ge=0)
    attention_weight: float = Field(default=0.0, ge=0)


class TrainConfig(BaseModel):
    """Everything about a training run but its places, which are given beside it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dpt: DistilledPretraining = DistilledPretraining()
    """Distilled pre-training."""
    dft: DistilledFinetuning = DistilledFinetuning()
    """Distilled fine-tuning."""
    sft: SupervisedFinetuning = SupervisedFinetuning()
    """Supervised fine-tuning."""
    lora: LoraSettings = LoraSettings()
    """Used by stages that train LoRA."""
    student_layers: tuple[int, ...] | None = None
    """Student layers that are matched; None takes the middle third's first ones."""
    num_matched: int | None = Field(default=None, ge=1)
    """How many student layers are matched; None follows the target store, fewer for a shallow student."""
    microbatch_size: int = Field(default=8, ge=1)
    """Samples of one forward pass on one rank; batch_size / (this x ranks) passes make a step."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    precision: Literal["no", "bf16"] = "no"
    """Automatic mixed precision of the forward pass; parameters stay float32."""
    seed: int = Field(default=0, ge=0)
    """Of the sample order and of new weights."""
    shuffle_shards: int = Field(default=8, ge=0)
    """Shards whose samples are mixed together; 0 keeps the stored order."""
    num_workers: int = Field(default=0, ge=0)
    """Loader processes; 0 loads in the training process."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept."""
    log_every: int = Field(default=10, ge=1)
    """Steps between lines of metrics.jsonl and points of TensorBoard."""

    def stage(self, name: StageName) -> StageConfig:
        """The settings of one stage."""
        config: StageConfig = getattr(self, name)
        return config


HARMLESS_ON_RESUME = frozenset({"num_workers", "checkpoint_every", "keep_checkpoints", "log_every", "microbatch_size"})
"""Settings that may change between a kill and its resume: they decide speed and bookkeeping, not the result."""
