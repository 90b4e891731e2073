"""The training stream: one WebDataset pipeline that joins tars and target shards, key by key."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import get_worker_info
from webdataset import DataPipeline

from storage.errors import FingerprintMismatch, UserError
from storage.join import joined_rows
from storage.order import StreamConfig, epoch_order, num_steps, rank_batch
from storage.records import MapTargets, SampleTargets
from storage.samples import SampleIndex, SampleShard
from storage.stores import Store
from storage.targets import TargetShard, TargetStore

__all__ = ["StreamConfig", "StreamedSample", "epoch_order", "num_steps", "shard_sizes", "target_stream"]


@dataclass(frozen=True)
class StreamedSample:
    """A sample together with what the teacher said of it."""

    key: str
    """The sample's key, equal in tar and targets."""
    record: dict[str, Any]
    """The LLaVA conversation."""
    images: tuple[bytes, ...]
    """Encoded images."""
    targets: SampleTargets
    """Tokens, answer mask and answer logits."""
    maps: MapTargets | None
    """Attention maps of the asked layers; None without an image, or when no maps are wanted."""


def shard_sizes(targets: TargetStore, allow_incomplete: bool = False) -> dict[int, int]:
    """Usable samples of each committed shard: what `epoch_order` and `num_steps` take.

    Raises:
        UserError: If shards are not committed yet and that is not allowed, or nothing is committed.
    """
    sizes = {shard: record.num_samples for shard, record in targets.commits.items()}
    planned = targets.manifest.num_shards
    missing = sorted(set(range(planned)) - set(sizes))
    if (missing and not allow_incomplete) or not any(sizes.values()):
        raise UserError(
            f"{targets.store.url} has {planned - len(missing)} of {planned} shards committed with "
            f"{sum(sizes.values())} samples (missing: {missing[:5]}); run `cdp extract-teacher` to finish it"
        )
    return sizes


def target_stream(
    samples: Store,
    targets: TargetStore | str | Path,
    config: StreamConfig,
    *,
    rank: int,
    world_size: int,
    epoch: int,
    start_batch: int = 0,
    layers: Sequence[int] | None = None,
    with_maps: bool = True,
) -> DataPipeline:
    """This rank's microbatches of one epoch, each a list of StreamedSample.

    Give it to `DataLoader(stream, batch_size=None, num_workers=W)`: batches come in the same order for any
    W. Make a new one for each epoch. Object stores need `multiprocessing_context="spawn"` (or
    `"forkserver"`).

    Args:
        samples: The sample set.
        targets: Its target store.
        config: Order and batch size.
        rank: This process, from 0.
        world_size: Processes that train together; each gets the same number of batches.
        epoch: Counted from 0; decides the order together with the seed.
        start_batch: Batches of this rank to leave out; nothing of them is read.
        layers: Teacher layers whose maps are read; None means all captured ones.
        with_maps: False leaves the attention maps unread, for a stage without the attention loss.

    Raises:
        FingerprintMismatch: If the targets were made from another sample set.
        UserError: If extraction did not finish (see `StreamConfig.allow_incomplete`).
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank} of {world_size}, expected 0 to {world_size - 1}")
    opened = targets if isinstance(targets, TargetStore) else TargetStore.open(targets)
    index = SampleIndex.load(samples)
    _check_same_samples(samples, index, opened)
    sizes = shard_sizes(opened, config.allow_incomplete)
    plan = _Plan(sizes, config, rank, world_size, epoch, start_batch)
    join = _Join(samples, index, opened, max(1, config.shuffle_shards), layers, with_maps)
    return DataPipeline(plan, _split_by_worker, join)


@dataclass(frozen=True)
class _Plan:
    """First stage: the (shard, row) of each batch, worked out anew in each worker rather than sent to it."""

    sizes: dict[int, int]
    config: StreamConfig
    rank: int
    world_size: int
    epoch: int
    start_batch: int

    def __call__(self) -> Iterator[NDArray[np.int64]]:
        config = self.config
        order = epoch_order(self.sizes, config.seed, self.epoch, config.shuffle_shards)
        for step in range(self.start_batch, num_steps(self.sizes, config.batch_size, self.world_size)):
            yield rank_batch(order, step, config.batch_size, self.rank, self.world_size)


def _split_by_worker(plan: Iterator[NDArray[np.int64]]) -> Iterator[NDArray[np.int64]]:
    """Batch i goes to worker i % W: the DataLoader asks its workers in turn, so the order stays."""
    worker = get_worker_info()
    for number, batch in enumerate(plan):
        if worker is None or number % worker.num_workers == worker.id:
            yield batch


class _Join:
    """Stage that reads (shard, row) from both sides. Shards are opened in the process that reads them."""

    def __init__(
        self,
        samples: Store,
        index: SampleIndex,
        targets: TargetStore,
        num_open: int,
        layers: Sequence[int] | None,
        with_maps: bool,
    ) -> None:
        self._samples, self._index, self._targets = samples, index, targets
        self._num_open, self._layers, self._with_maps = num_open, layers, with_maps

    def __call__(self, batches: Iterator[NDArray[np.int64]]) -> Iterator[list[StreamedSample]]:
        opened: OrderedDict[int, _JoinedShard] = OrderedDict()
        try:
            for batch in batches:
                yield [
                    self._shard(shard, opened).read(row, self._layers, self._with_maps) for shard, row in batch.tolist()
                ]
        finally:
            for joined in opened.values():
                joined.close()

    def _shard(self, number: int, opened: "OrderedDict[int, _JoinedShard]") -> "_JoinedShard":
        if number not in opened:
            # A batch may lie across two groups of shards; more than that is never needed at once.
            while len(opened) >= self._num_open + 1:
                opened.popitem(last=False)[1].close()
            opened[number] = _JoinedShard(self._samples, self._index, self._targets, number)
        opened.move_to_end(number)
        return opened[number]


class _JoinedShard:
    """One tar and its targets, whose keys were compared."""

    def __init__(self, samples: Store, index: SampleIndex, targets: TargetStore, number: int) -> None:
        self._targets: TargetShard = targets.shard(number)
        entry, self._tar_rows = joined_rows(index, self._targets)
        self._tar = SampleShard.open(samples, entry)

    def read(self, row: int, layers: Sequence[int] | None, with_maps: bool) -> StreamedSample:
        stored = self._tar.read(self._tar_rows[row])
        targets, maps = self._targets.read(row, with_maps, layers)
        assert stored.key == targets.key
        return StreamedSample(stored.key, stored.record, stored.images, targets, maps)

    def close(self) -> None:
        self._tar.close()


def _check_same_samples(samples: Store, index: SampleIndex, targets: TargetStore) -> None:
    wanted = targets.manifest.fingerprint.samples
    if index.digest != wanted:
        raise FingerprintMismatch(
            f"targets at {targets.store.url} were made from samples {wanted[:12]}, {samples.url} holds "
            f"{index.digest[:12]} (differs in: samples); give the right sample set, or extract again"
        )
