"""Settings of one training stage; defaults are the published recipe (docs/method.md#stages-of-training)."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.settings import AtResume
from storage.strict_model import StrictModel

AttentionLoss = Literal["cosine", "kl", "mse", "row_kl"]
Alignment = Literal["same", "uld", "shared"]
Divergence = Literal["forward", "reverse", "symmetric", "jensen_shannon"]
StageName = Literal["dpt", "dft", "sft"]
STAGES: tuple[StageName, ...] = ("dpt", "dft", "sft")


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
    its own vision tower (`train.vision` own) has its projector in the post-connector's place."""
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
    kd_alignment: Alignment = "same"
    """How logits are compared: `same` needs the teacher's tokenizer. The others compare a student with another one,
    where both have read the same text of an answer: `uld` the probabilities sorted by size, `shared` those of the
    tokens that both have."""
    attention_weight: float = Field(default=1.0, ge=0)
    """Weight of the alignment with the teacher's visual attention; 0 leaves it out, and the maps unread."""
    answer_attention_weight: float = Field(default=0.0, ge=0)
    """Weight of the alignment of attention from whole answers to the image; the targets must hold it
    (`teacher.answer_attention`). 0 leaves it out, and what is stored of it unread."""
    attention_loss: AttentionLoss = "cosine"
    """How attention is compared: pooled over queries by `cosine`, `kl` or `mse`, or query by query (`row_kl`). `mse` is
    smaller by orders of magnitude and needs another weight. Attention from answers is compared in the same way."""
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
    samples: Annotated[str | None, AtResume.SAME_DATA] = None
    """Sample shards of this stage, when not those of the run."""
    targets: Annotated[str | None, AtResume.SAME_DATA] = None
    """Target store of this stage, when not that of the run."""
    sources: Annotated[tuple[DataSource, ...], AtResume.SAME_DATA] = ()
    """Several stores at once for this stage, in place of `samples` and `targets`."""
    subset: Annotated[str | None, AtResume.SAME_DATA] = None
    """Text file with the keys of the samples to use in this stage, one a line, when not that of the run."""
    max_samples: int | None = Field(default=None, ge=1)
    """Sample budget of this stage, when not that of the run."""
    validation_subset: Annotated[str | None, AtResume.SAME_DATA] = None
    """Text file with the keys of the samples that this stage holds out, one a line, when not those of the run."""

    @model_validator(mode="after")
    def _check_divergence(self) -> "StageConfig":
        if self.kd_alignment != "same" and self.kd_divergence != "forward":
            found = f"kd_divergence {self.kd_divergence} compares tokens of one tokenizer"
            raise ValueError(f"{found}; leave it at forward with kd_alignment {self.kd_alignment}")
        return self

    @property
    def aligns_tokenizers(self) -> bool:
        """Whether logits are compared across tokenizers."""
        return self.kd_weight > 0 and self.kd_alignment != "same"

    @property
    def matches_layers(self) -> bool:
        """Whether student layers learn from teacher layers, by whatever loss."""
        return self.attention_weight > 0 or self.answer_attention_weight > 0


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
