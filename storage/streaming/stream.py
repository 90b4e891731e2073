"""The training stream: one WebDataset pipeline that joins tars and target shards, key by key."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple

import numpy as np
from torch.utils.data import get_worker_info
from webdataset import DataPipeline

from storage.streaming.join import JoinedShard, OpenShards, StreamedSample
from storage.streaming.mixture import Mixture, Source
from storage.streaming.order import Ints, StreamConfig, deal, num_microbatches

__all__ = ["Mixture", "Source", "StreamConfig", "StreamedSample", "mixture_stream"]


def mixture_stream(
    mixture: Mixture,
    *,
    rank: int,
    world_size: int,
    epochs: range,
    start_step: int = 0,
    layers: Sequence[int] | None = None,
    with_maps: bool = True,
    with_answers: bool = False,
) -> DataPipeline:
    """This rank's microbatches of all steps, each a list of StreamedSample.

    Give it to `DataLoader(stream, batch_size=None, num_workers=W)`: batches come in the same order for any W.
    Object stores need `multiprocessing_context="spawn"` (or `"forkserver"`).

    Args:
        mixture: The samples, their order and the sizes of steps and microbatches.
        rank: This process, from 0.
        world_size: Processes that train together; each gets the same number of microbatches in each step.
        epochs: Which ones, counted from 0; each decides an order together with the seed.
        start_step: Steps of the first of them to leave out; nothing of them is read.
        layers: Teacher layers whose maps are read; None means all captured ones.
        with_maps: False leaves the attention maps unread, for a stage without the attention loss.
        with_answers: True reads answer attention.

    Raises:
        UserError: While it is read, if answer attention is to be read and is not stored.
        CorruptData: While it is read, for damaged or missing bytes; names the shard.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank} of {world_size}, expected 0 to {world_size - 1}")
    return DataPipeline(
        partial(_steps, mixture, epochs, start_step, world_size),
        _split_by_worker,
        partial(_joined, mixture, rank, world_size, layers, with_maps, with_answers),
    )


class _Step(NamedTuple):
    """One step as all ranks and workers see it."""

    rows: Ints
    """`[n, 2]`: its slice of the global order."""
    ahead: Ints
    """The slice and what comes after it: rows whose shards should be open, or be opened now."""
    batches: tuple[int, ...]
    """Its microbatches, or those of them that this worker makes."""


def _steps(mixture: Mixture, epochs: range, start_step: int, world_size: int) -> Iterator[_Step]:
    """First stage: all steps, worked out anew in each worker rather than sent to it."""
    config = mixture.config
    num_ahead = config.batch_size + mixture.group_rows
    order: Ints | None = None
    for epoch in epochs:
        order = mixture.order(epoch) if order is None else order
        following: Ints | None = None
        for step in range(start_step if epoch == epochs[0] else 0, mixture.num_steps):
            first = step * config.batch_size
            rows, ahead = order[first : first + config.batch_size], order[first : first + num_ahead]
            if len(ahead) < num_ahead and epoch + 1 in epochs:
                # Also the next epoch should find its first shards open.
                following = mixture.order(epoch + 1) if following is None else following
                ahead = np.concatenate([ahead, following[: num_ahead - len(ahead)]])
            count = num_microbatches(len(rows), config.microbatch_size, world_size)
            yield _Step(rows, ahead, tuple(range(count)))
        order = following


def _split_by_worker(plan: Iterator[_Step]) -> Iterator[_Step]:
    """Microbatch i of all goes to worker i % W: the DataLoader asks its workers in turn, so the order stays."""
    worker = get_worker_info()
    worker_id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
    done = 0
    for step in plan:
        if mine := tuple(n for n in step.batches if (done + n) % num_workers == worker_id):
            yield step._replace(batches=mine)
        done += len(step.batches)


def _joined(
    mixture: Mixture,
    rank: int,
    world_size: int,
    layers: Sequence[int] | None,
    with_maps: bool,
    with_answers: bool,
    steps: Iterator[_Step],
) -> Iterator[list[StreamedSample]]:
    """Last stage: deals a step out and reads it from both sides. Shards are opened in the process that reads them."""
    config = mixture.config

    def open_shard(shard: int) -> JoinedShard:
        number, shard = mixture.locate(shard)
        return JoinedShard(mixture.sources[number].samples, mixture.sources[number].targets, shard)

    with closing(OpenShards(open_shard)) as opened:
        for step in steps:
            opened.need(dict.fromkeys(step.ahead[:, 0].tolist()))
            lengths = _lengths(step.rows, opened) if config.bucket_by_length else None
            dealt = deal(len(step.rows), config.microbatch_size, world_size, lengths)
            for number in step.batches:
                rows = step.rows[dealt[number][rank]].tolist()
                yield [opened[shard].read(row, layers, with_maps, with_answers) for shard, row in rows]


def _lengths(rows: Ints, opened: OpenShards) -> Ints:
    """`[n]` tokens of each row's sample."""
    lengths = np.zeros(len(rows), dtype=np.int64)
    for shard in np.unique(rows[:, 0]).tolist():
        of_shard = rows[:, 0] == shard
        lengths[of_shard] = opened[shard].num_tokens[rows[of_shard, 1]]
    return lengths
