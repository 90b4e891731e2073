"""An estimate of an extraction: how it is to be made, and what it says."""

from typing import Literal

from pydantic import Field

from storage.codecs.codec_settings import MapCodecName
from storage.strict_model import StrictModel

SHOWN_UNUSABLE = 5


class EstimateConfig(StrictModel):
    """How `cdp estimate` looks at the samples, and what it assumes where nothing can be measured."""

    seed: int = 0
    """Chooses the samples; another seed shows how much the choice matters."""
    num_blocks: int = Field(default=8, ge=2)
    """Blocks of consecutive samples that are read, spread over the set. From an object store each downloads its
    shard."""
    num_sampled: int = Field(default=1024, ge=2)
    """Samples that are read and tokenised for their counts, in all blocks together."""
    num_measured: int = Field(default=64, ge=2)
    """Samples of these that go through the teacher; at least two batches do."""
    samples: int | None = Field(default=None, ge=1)
    """From configs alone, without sample shards: how many there are."""
    samples_per_shard: int = Field(default=512, ge=1)
    """From configs alone, without sample shards."""
    answer_rows: float = Field(default=100.0, ge=1)
    """From configs alone, without sample shards: answer tokens of a sample."""
    text_tokens: float = Field(default=200.0, ge=1)
    """From configs alone, without sample shards: tokens of a sample that are not image tokens, answers included."""
    samples_per_map: float = Field(default=2.0, ge=1)
    """From configs alone, without sample shards: conversations about one image, which share its maps."""
    gpu_tflops: float = Field(default=312.0, gt=0)
    """From configs alone: peak of one GPU in 10^12 operations a second; 312 is the data sheet's for an A100 in
    bfloat16."""
    efficiency: float = Field(default=0.4, gt=0, le=1)
    """From configs alone: share of the peak that the teacher's forward pass reaches."""
    gpu_memory_gb: float = Field(default=80.0, gt=0)
    """From configs alone: memory of one GPU in 10^9 bytes, for how many a teacher needs."""


class SettingEstimate(StrictModel):
    """A whole extraction with one map codec."""

    shard_bytes: int
    """All files of all target shards: what `cdp extract-teacher` reports as the size."""
    shard_bytes_95: tuple[int, int] | None
    """95 % interval for the choice of samples; None where nothing was measured."""
    bytes_by_array: dict[str, int]
    """`shard_bytes` by array; `(metadata)` is that of all arrays. From configs alone `map_codes` is all of the
    maps and `token_ids` all of the tokens."""
    store_bytes: int
    """`shard_bytes`, commit records and the folder `teacher/`."""
    worker_seconds: float
    """Seconds of all workers together, loading the teacher not included."""
    wall_seconds: float
    """From the start of the workers to the last shard, with as many workers as the estimate names."""


class TeacherMemory(StrictModel):
    """What one teacher takes of GPUs' memory, in bytes, with as many GPUs as it needs."""

    gpu_bytes: int
    """Memory of one GPU, as asked."""
    gpus: int | None
    """The fewest that hold it with a batch (`extract.gpus_per_worker`); None if a GPU for each layer does not, or, with
    `teacher.parallel` tensor, one for each of the heads of keys and values."""
    batch_size: int
    """`teacher.batch_size`, or the largest power of two that fits into so many."""
    batches_in_flight: int = 1
    """That are in the teacher at once; all count in what follows."""
    weight_bytes: int
    activation_bytes: int
    """On each GPU: what a layer, or the coding of answer rows, makes and frees, once for each batch in flight."""
    map_bytes: int
    """Maps of the batches in flight or waiting for coding, and their coding; taken to be on one GPU."""
    cache_bytes: int
    """Keys and values of prefixes; 0 without `teacher.prefix_reuse`."""
    bytes_of_weights_per_gpu: int
    bytes_per_gpu: int
    """All of it on the GPU that has most."""


class TeacherCost(StrictModel):
    """What the teacher takes, whatever the map codec; from configs alone, what is not computed is 0."""

    device: str
    """CPU, or the name of the GPU, where coding and writing go on beside the teacher."""
    threads: int = 1
    """Of each worker, as extraction sets them on this machine."""
    gpus_per_worker: int = 1
    """GPUs that hold one teacher."""
    memory: TeacherMemory | None = None
    """From configs alone."""
    load_seconds: float = 0.0
    """Loading the teacher, once a worker."""
    teacher_seconds_per_sample: float
    """Forward pass with all that happens beside it, at the batch size of extraction, after a warm-up."""
    vision_bytes: int = 0
    """Of the folder `teacher/`."""
    num_measured: int = 0
    """Samples that went through the teacher."""


class Estimate(TeacherCost):
    """What `cdp estimate` found, before anything is written."""

    basis: Literal["measured", "analytic"]
    """measured: on samples that went through the teacher. analytic: computed from configs, much less exact."""
    teacher: str
    samples_url: str | None
    num_samples: int
    num_shards: int
    num_sampled: int
    """Samples read and tokenised."""
    per_sample: dict[str, float]
    """Usable samples, tokens, answer rows, answer keys, maps, image tokens and map entries of a sample of the set; the
    last three are those of stored maps, which samples share. Answer keys are its image tokens times its answers."""
    unusable: dict[str, int]
    """Reason -> samples of those read that could not be used."""
    unusable_examples: tuple[str, ...]
    """The first of them, each with what was found."""
    cut_samples: int
    """Samples of those read that `teacher.max_length` takes answer tokens from."""
    cut_answer_tokens: int
    """How many it takes."""
    workers: int
    coding_seconds_per_map: dict[MapCodecName, float]
    """Empty from configs alone, as the next."""
    writing_seconds_per_shard: dict[MapCodecName, float]
    chosen: MapCodecName
    """The codec that extraction would use with these settings."""
    settings: dict[MapCodecName, SettingEstimate]
    answer_row_bytes: int
    """Of one answer row before compression."""
    answer_row_bytes_at_1: int
    """The same without `teacher.temperatures`."""
    answer_bytes_by_top_k: dict[int, int]
    """Kept tokens of an answer row -> bytes of all answer rows."""
    files_per_shard: int
    """Objects of an object store; the commit record is one of them."""
    notes: tuple[str, ...]
    """What the numbers rest on."""
