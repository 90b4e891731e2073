"""The one global order of an epoch, its steps, and which part of a step each rank gets."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from storage.strict_model import StrictModel

Ints = NDArray[np.int64]


class StreamConfig(StrictModel):
    """How samples are chosen, ordered and cut into steps."""

    seed: int = Field(ge=0)
    """Another seed is another order of every epoch."""
    shuffle_shards: int = Field(default=8, ge=0)
    """Shards whose samples are mixed; 0 keeps the tars' order. More mixes better and keeps more shards open: these, and
    towards their end as many next ones."""
    batch_size: int = Field(ge=1)
    """Samples of one step, over all ranks: a fixed slice of the global order, whatever reads it."""
    microbatch_size: int | None = Field(default=None, ge=1)
    """Most samples that one rank gets at once; None gives it all its samples of a step in one."""
    bucket_by_length: bool = False
    """Sort the samples of a step by their tokens before they are dealt out, so that microbatches are padded less."""
    max_samples: int | None = Field(default=None, ge=1)
    """Different samples that are used: a seeded choice, the same in each epoch; None uses all."""
    allow_incomplete: bool = False
    """Train on the shards committed so far. Off, a store whose extraction did not finish is refused."""


def epoch_order(parts: Sequence[Ints], seed: int, epoch: int, shuffle_shards: int) -> Ints:
    """`[num_samples, 2]` int64: every row of `parts` once, in the order of one epoch.

    Each part holds the `[n, 2]` (shard, row) of one shard. Parts are permuted, taken in groups of `shuffle_shards`, and
    the rows of a group are permuted together; with 0, parts and rows stay as they come. The order depends on the
    arguments only: not on ranks, workers, platform or numpy's version (it sorts PCG64's raw output, which numpy keeps
    stable).
    """
    bits = raw_bits(seed, epoch)
    if shuffle_shards:
        parts = [parts[number] for number in permutation(bits, len(parts))]
    group_size = shuffle_shards or max(1, len(parts))
    groups = [np.zeros((0, 2), dtype=np.int64)]
    for first in range(0, len(parts), group_size):
        rows = np.concatenate(parts[first : first + group_size])
        groups.append(rows[permutation(bits, len(rows))] if shuffle_shards else rows)
    return np.concatenate(groups)


def num_microbatches(num_samples: int, microbatch_size: int | None, world_size: int) -> int:
    """Microbatches in which each rank gets its part of a step of so many samples; at least 1."""
    return 1 if microbatch_size is None else max(1, -(-num_samples // (microbatch_size * world_size)))


def deal(num_samples: int, microbatch_size: int | None, world_size: int, lengths: Ints | None) -> list[list[Ints]]:
    """Which samples of a step make up each microbatch of each rank.

    The step is cut into as many runs as there are microbatches, and a run into one piece for each rank, all as
    evenly as can be, the first ones getting one more. A piece has at most `microbatch_size` samples; None is one
    microbatch. With `lengths`, the `[num_samples]` tokens, the longest come first: microbatches with the same number
    have like lengths on all ranks, which wait for each other, and what does not fit into memory fails at once.

    Returns:
        Positions in the step, by microbatch and rank; some are empty if there are fewer samples than ranks.
    """
    positions = np.arange(num_samples) if lengths is None else np.argsort(-lengths, kind="stable")
    runs = np.array_split(positions, num_microbatches(num_samples, microbatch_size, world_size))
    return [np.array_split(run, world_size) for run in runs]


def shard_rows(shard: int, size: int) -> Ints:
    """`[size, 2]` (shard, row) of a whole shard."""
    return np.stack([np.full(size, shard, dtype=np.int64), np.arange(size, dtype=np.int64)], axis=1)


def raw_bits(*address: int) -> np.random.PCG64:
    """The random bits that belong to these numbers, a seed among them; trailing zeros do not count."""
    return np.random.PCG64(np.random.SeedSequence(address))


def permutation(bits: np.random.PCG64, size: int) -> NDArray[np.intp]:
    """The numbers below `size` in the order of as many next raw draws."""
    return np.argsort(bits.random_raw(size), kind="stable")
