"""Settings of student training; defaults are the published recipe (docs/method.md#stages-of-training)."""

from typing import Literal

from pydantic import Field, field_validator

from stages.layers import LayerSpan, Matching
from stages.student.losses import AttentionLoss, Divergence
from storage.strict_model import StrictModel

StageName = Literal["dpt", "dft", "sft"]
STAGES: tuple[StageName, ...] = ("dpt", "dft", "sft")
Parallel = Literal["ddp", "fsdp"]
Tracker = Literal["tensorboard", "wandb"]


class LoraSettings(StrictModel):
    """Low-rank adaptation of the decoder's linear layers."""

    rank: int = Field(default=128, ge=1)
    """Rank of each update; higher learns more and costs memory."""
    alpha: int = Field(default=256, ge=1)
    """Scale of the update is alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the update's input."""


class DataSource(StrictModel):
    """A target store with its samples, as one of several to train on."""

    samples: str
    """Sample shards: a folder or an object-store URL."""
    targets: str
    """Their target store."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Passes over it in an epoch: 2 has each sample twice, 0.5 a half, and the other half in the next epoch."""
    subset: str | None = None
    """Text file with the keys of the samples to use, one a line; None uses all."""


class StageConfig(StrictModel):
    """One stage of training; its subclasses hold the published settings."""

    trains: Literal["post_connector", "lora", "full"]
    """What learns: the post-connector alone, LoRA on the decoder with it, or the whole decoder with it. A student with
    its own eyes (`adapter`) has its projector in the post-connector's place."""
    batch_size: int = Field(ge=1)
    """Samples of an optimizer step, over all ranks and accumulation steps."""
    lm_weight: float = Field(default=1.0, ge=0)
    """Weight of the next-token cross entropy on the answers."""
    kd_weight: float = Field(default=1.0, ge=0)
    """Weight of the cross entropy under the teacher's answer distribution; 0 leaves it out."""
    kd_temperature: float = Field(default=1.0, gt=0)
    """Divides the logits of both in that term; one the target store holds. Its gradient shrinks as the square of it."""
    kd_divergence: Divergence = "forward"
    """What `kd_weight` weighs: `forward` is the published cross entropy, to which tokens outside the stored top-k
    contribute by draws; `reverse`, `symmetric` and `jensen_shannon` take these tokens together for one."""
    attention_weight: float = Field(default=1.0, ge=0)
    """Weight of the alignment with the teacher's visual attention; 0 leaves it out, and the maps unread."""
    attention_loss: AttentionLoss = "cosine"
    """How pooled attention is compared; `mse` is smaller by orders of magnitude and needs another weight."""
    attention_sink_mask: bool = True
    """Whether attention sinks are left out on either side. Codes of few bits cut sinks: without the mask the gradient
    is less exact, which the command says."""
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
    sources: tuple[DataSource, ...] = ()
    """Several stores at once for this stage, in place of `samples` and `targets`."""
    subset: str | None = None
    """Text file with the keys of the samples to use in this stage, one a line, when not that of the run."""
    max_samples: int | None = Field(default=None, ge=1)
    """Sample budget of this stage, when not that of the run."""


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


class TrainConfig(StrictModel):
    """Everything about a training run but its places, which are given beside it."""

    dpt: DistilledPretraining = DistilledPretraining()
    """Distilled pre-training."""
    dft: DistilledFinetuning = DistilledFinetuning()
    """Distilled fine-tuning."""
    sft: SupervisedFinetuning = SupervisedFinetuning()
    """Supervised fine-tuning."""
    stages: tuple[StageName, ...] = Field(default=STAGES, min_length=1)
    """Which of them are trained, in this order. Each starts from the student of the last one before it that the run
    folder holds, the first from the decoder."""
    adapter: Literal["teacher", "own"] = "teacher"
    """teacher: the teacher's tower and adapter, a post-connector, and the decoder named as the student. own: a whole
    multimodal checkpoint with its own tower and adapter, which must make as many image tokens of each sample as the
    teacher did."""
    own_adapter: Literal["trained", "frozen"] = "trained"
    """With adapter own: whether its projector learns in every stage, or stays as it is; the tower always stays."""
    lora: LoraSettings = LoraSettings()
    """Used by stages that train LoRA."""
    student_layers: tuple[int, ...] | None = None
    """Student layers that are matched; None takes the middle third's first ones."""
    num_matched: int | None = Field(default=None, ge=1)
    """How many student layers are matched; None follows the target store, fewer for a shallow student."""
    matching: Matching = "group"
    """Whether a matched student layer learns from the mean of a window of teacher layers, or from one of them."""
    layers: LayerSpan | None = None
    """Part of both decoders that is matched: their early, middle or late layers, or all; teacher layers must be in the
    targets. None takes all that the targets hold, for the student's middle third."""
    microbatch_size: int = Field(default=8, ge=1)
    """Samples of one forward pass on one rank; batch_size / (this x ranks) passes make a step."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: mixed precision; what learns stays float32, what is frozen is kept in bfloat16. auto is bf16 on a GPU that
    has it, else fp32."""
    activation_checkpointing: bool = False
    """Activations of each decoder layer are computed again in the backward pass: less memory, a third more time."""
    ray_address: str | None = None
    """Address of a Ray cluster to train on, as the processes of one group; None trains in this process, or in those
    that torchrun or `accelerate launch` started."""
    workers: int | None = Field(default=None, ge=1)
    """Processes of that group; None is one a GPU, or one without GPUs. Given without an address, Ray starts here."""
    max_attempts: int = Field(default=3, ge=1)
    """Times that group is started when a process or node dies; each goes on from the newest checkpoint."""
    parallel: Parallel = "ddp"
    """With several processes: ddp, a copy of the student in each; fsdp, a part of each parameter (FSDP2)."""
    seed: int = Field(default=0, ge=0)
    """Of the sample order and of new weights."""
    shuffle_shards: int = Field(default=8, ge=0)
    """Shards whose samples are mixed together; 0 keeps the stored order."""
    sources: tuple[DataSource, ...] = ()
    """Several stores at once, in place of the run's `samples` and `targets`; one order goes over all of them."""
    subset: str | None = None
    """Text file with the keys of the samples to use, one a line; with `sources` each has its own."""
    max_samples: int | None = Field(default=None, ge=1)
    """Sample budget: so many different samples, drawn by `seed`, the same in each epoch; None uses all."""
    allow_incomplete: bool = False
    """Train on the shards committed so far of a store whose extraction did not finish; off, it is refused. A stage that
    was begun so does not go on once the store holds other shards: its order of samples would be another."""
    bucket_by_length: bool = True
    """Samples of like length share a microbatch. A step has the same samples either way: less padding, same result."""
    num_workers: int | None = Field(default=None, ge=0)
    """Loader processes of each training process; 0 loads in it. None is one for each core that nothing computes with,
    up to 4: on a machine without a GPU torch computes with all cores unless OMP_NUM_THREADS says otherwise."""
    prefetch: int | None = Field(default=None, ge=1)
    """Microbatches that each loader process has ready; None is its share of a step, so that the next step is made while
    one is taken, and at least 2. More bridge longer stalls; all lie in shared memory."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept."""
    log_every: int = Field(default=10, ge=1)
    """Steps between lines of metrics.jsonl and points of the trackers' curves."""
    trackers: tuple[Tracker, ...] = ("tensorboard",)
    """Where else metrics go: tensorboard (if installed), wandb (extra `wandb`)."""

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


HARMLESS_ON_RESUME = frozenset(
    {
        "stages",
        "allow_incomplete",
        "num_workers",
        "prefetch",
        "bucket_by_length",
        "checkpoint_every",
        "keep_checkpoints",
        "log_every",
        "microbatch_size",
        "activation_checkpointing",
        "parallel",
        "ray_address",
        "workers",
        "max_attempts",
        "trackers",
    }
)
"""Settings that may change between a kill and its resume: they decide speed, bookkeeping and
what is refused, not the result."""
