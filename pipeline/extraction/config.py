"""Settings of an extraction."""

from pydantic import Field

from storage.strict_model import StrictModel


class ExtractConfig(StrictModel):
    """How extraction runs; none of it changes what is stored."""

    ray_address: str | None = None
    """Address of a Ray cluster; None starts one on this machine."""
    workers: int | None = Field(default=None, ge=1)
    """Most teachers that run side by side; None is one for each `gpus_per_worker` GPUs of a machine, or one a core
    without GPUs, that the cluster has at the time, so that nodes that join are used."""
    gpus_per_worker: int = Field(default=1, ge=1)
    """GPUs of one machine that hold one teacher, for a teacher that one GPU cannot hold: its layers in a row over them,
    or each layer split (`teacher.parallel`, docs/scale.md#a-teacher-over-several-gpus). Without GPUs 1 is the only
    choice, or with `teacher.parallel: tensor` the number of processes."""
    batches_in_flight: int | None = Field(default=None, ge=1, le=64)
    """Batches that are in one teacher at once, at most, so that none of its GPUs waits for another. Each takes memory.
    None is one for a teacher on one GPU or a CPU, and one more than GPUs for one over several
    (docs/scale.md#a-teacher-over-several-gpus)."""
    max_attempts: int = Field(default=3, ge=1)
    """Tries of one shard before it is given up and reported."""
    max_skipped_fraction: float = Field(default=0.0, ge=0, le=1)
    """Samples that may be unusable before the command fails; they are in the ledger either way."""


def threads_per_worker(cpus: int, gpus: int, workers: int | None, num_shards: int, gpus_per_worker: int = 1) -> int:
    """Gives each worker its share of its machine's cores."""
    side_by_side = gpus // gpus_per_worker or min(workers or cpus, max(num_shards, 1))
    return max(1, cpus // side_by_side)
