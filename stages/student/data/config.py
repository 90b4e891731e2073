"""Settings of how batches are made and read ahead."""

from pydantic import Field

from storage.strict_model import StrictModel


class LoaderConfig(StrictModel):
    """How batches are made and read ahead; none of it changes what a step learns from."""

    microbatch_size: int = Field(default=8, ge=1)
    """Samples of one forward pass on one rank; batch_size / (this x ranks) passes make a step."""
    bucket_by_length: bool = True
    """Samples of like length share a microbatch. A step has the same samples either way: less padding, same result."""
    num_workers: int | None = Field(default=None, ge=0)
    """Loader processes of each training process; 0 loads in it. None is one for each core that nothing computes with,
    up to 4: on a machine without a GPU torch computes with all cores unless OMP_NUM_THREADS says otherwise."""
    prefetch: int | None = Field(default=None, ge=1)
    """Microbatches that each loader process has ready; None is its share of a step, so that the next step is made while
    one is taken, and at least 2. More bridge longer stalls; all lie in shared memory."""
    stall_s: float = Field(default=1800.0, gt=0)
    """Seconds without a batch after which the run ends with an error. A shard of a slow store may take minutes."""
