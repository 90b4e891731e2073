"""The one global order of an epoch, and which part of it each rank and each worker gets."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field


class StreamConfig(BaseModel):
    """How samples are ordered and cut into microbatches."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(ge=0)
    """Another seed is another order of every epoch."""
    shuffle_shards: int = Field(default=8, ge=0)
    """Shards whose samples are mixed. More mixes better and keeps more shards open; 0 keeps the tars' order.
    """
    batch_size: int = Field(ge=1)
    """Samples of one microbatch on one rank."""
    allow_incomplete: bool = False
    """Train on the shards committed so far. Off, a store whose extraction did not finish is refused."""


def epoch_order(sizes: Mapping[int, int], seed: int, epoch: int, shuffle_shards: int) -> NDArray[np.int64]:
    """Every (shard, row) once, in the order of one epoch.

    Shards are permuted, taken in groups of `shuffle_shards`, and the rows of a group are permuted together.
    The order depends on the arguments only: not on ranks, workers, platform or numpy's version (it sorts
    PCG64's raw output, which numpy keeps stable).

    Args:
        sizes: Shard number -> usable samples.
        seed: The run's seed.
        epoch: Counted from 0.
        shuffle_shards: Shards mixed together; 0 gives shards and rows in their stored order.

    Returns:
        `[num_samples, 2]` int64.
    """
    shards = np.array(sorted(sizes), dtype=np.int64)
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    if shuffle_shards:
        shards = shards[_permutation(bits, len(shards))]
    group_size = shuffle_shards or max(1, len(shards))
    groups = [np.zeros((0, 2), dtype=np.int64)]
    for first in range(0, len(shards), group_size):
        members = shards[first : first + group_size].tolist()
        rows = np.concatenate([_rows_of(shard, sizes[shard]) for shard in members])
        groups.append(rows[_permutation(bits, len(rows))] if shuffle_shards else rows)
    return np.concatenate(groups)


def num_steps(sizes: Mapping[int, int], batch_size: int, world_size: int) -> int:
    """Microbatches of every rank in one epoch: ceil(samples / (batch_size * world_size))."""
    return -(-sum(sizes.values()) // (batch_size * world_size))


def rank_batch(order: NDArray[np.int64], number: int, batch_size: int, rank: int, world_size: int) -> NDArray[np.int64]:
    """Microbatch `number` of one rank.

    Global batch g is the slice of `batch_size * world_size` samples at g times that; rank r gets its r-th
    part. The last, partial one is spread evenly, the first ranks getting one more: with 5 samples left for
    4 ranks 2, 1, 1, 1.

    Returns:
        `[n, 2]` (shard, row); n is `batch_size` but in the last batch, where it may be 0.
    """
    global_size = batch_size * world_size
    rows = order[number * global_size : (number + 1) * global_size]
    share, left = divmod(len(rows), world_size)
    start = rank * share + min(rank, left)
    return rows[start : start + share + (rank < left)]


def _rows_of(shard: int, size: int) -> NDArray[np.int64]:
    return np.stack([np.full(size, shard, dtype=np.int64), np.arange(size, dtype=np.int64)], axis=1)


def _permutation(bits: np.random.PCG64, size: int) -> NDArray[np.int64]:
    return np.argsort(bits.random_raw(size), kind="stable")
