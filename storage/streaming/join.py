"""A tar and its target shard as one: which rows belong together, and shards opened before they are needed."""

import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.codecs.attention_maps import EncodedMaps
from storage.errors import CorruptData
from storage.samples.sample_set import SampleSet
from storage.samples.table import SampleMembers
from storage.targets.sample_targets import SampleTargets
from storage.targets.shard_reader import TargetShard
from storage.targets.store import TargetStore

OPENING_THREADS = 4
"""Shards that one loader process opens, and downloads, at once."""


@dataclass(frozen=True)
class StreamedSample:
    """A sample together with what the teacher said of it."""

    key: str
    """Equal in tar and targets."""
    record: dict[str, Any]
    images: tuple[bytes, ...]
    """The LLaVA conversation, and its images as in `StoredSample`."""
    targets: SampleTargets
    maps: EncodedMaps | None
    """Attention maps of the asked layers; None without an image, or when no maps are wanted."""


class JoinedShard:
    """One tar and its targets, whose keys were compared.

    Raises:
        CorruptData: From any method, for damaged or missing bytes; names the shard and the command that looks for more.
    """

    def __init__(self, samples: SampleSet, targets: TargetStore, number: int) -> None:
        self._verify = f"cdp verify {shlex.quote(targets.store.url)} --samples {shlex.quote(samples.store.url)}"
        with self._damage_named():
            self._targets: TargetShard = targets.shard(number)
            members, self._tar_rows = joined_rows(samples, self._targets)
            self._tar = samples.shard(number, members)

    @property
    def num_tokens(self) -> NDArray[np.int64]:
        """`[S]`: tokens of each sample."""
        return self._targets.num_tokens

    def read(
        self, row: int, layers: Sequence[int] | None, with_maps: bool, with_answers: bool = False
    ) -> StreamedSample:
        """The sample at `row` of the target shard; arguments as for `TargetShard.read`."""
        with self._damage_named():
            stored = self._tar.read(self._tar_rows[row])
            targets, maps = self._targets.read(row, with_maps, layers, with_answers)
            if stored.key != targets.key:
                raise CorruptData(f"sample {row} of a shard is {targets.key} to its targets, {stored.key} to its tar")
        return StreamedSample(stored.key, stored.record, stored.images, targets, maps)

    def close(self) -> None:
        """Close the tar; downloads may be evicted then."""
        self._tar.close()

    @contextmanager
    def _damage_named(self) -> Iterator[None]:
        try:
            yield
        except CorruptData as error:
            raise CorruptData(f"{error}. What else is damaged, says `{self._verify}`") from error


class OpenShards:
    """The shards that are needed now and soon: opened by threads, closed when they are no longer needed."""

    def __init__(self, open_shard: Callable[[int], JoinedShard]) -> None:
        self._open_shard = open_shard
        self._threads = ThreadPoolExecutor(OPENING_THREADS, thread_name_prefix="shards")
        self._shards: dict[int, Future[JoinedShard]] = {}

    def need(self, shards: Iterable[int]) -> None:
        """Begin to open these shards, the first ones first; close all others."""
        wanted = dict.fromkeys(shards)
        for number in self._shards.keys() - wanted.keys():
            opening = self._shards.pop(number)
            if not opening.cancel():
                opening.add_done_callback(_close)
        for number in wanted:
            if number not in self._shards:
                self._shards[number] = self._threads.submit(self._open_shard, number)

    def __getitem__(self, number: int) -> JoinedShard:
        """A shard that is needed; waits until it is open, and raises what opening it raised."""
        return self._shards[number].result()

    def close(self) -> None:
        """Close all; what is being opened now is waited for."""
        self.need(())
        self._threads.shutdown(cancel_futures=True)


def _close(opened: "Future[JoinedShard]") -> None:
    """Also a shard whose opening could not be called off any more."""
    if opened.exception() is None:
        opened.result().close()


def joined_rows(samples: SampleSet, targets: TargetShard) -> tuple[tuple[SampleMembers, ...], list[int]]:
    """The member table of a target shard's tar, and the tar row of each of the shard's rows.

    Raises:
        CorruptData: Unless the targets' keys are the tar's without the skipped ones, in the tar's order.
    """
    record, shards = targets.record, samples.index.shards
    where = f"target shard {record.shard} ({record.path})"
    if record.shard >= len(shards) or shards[record.shard].name != record.sample_shard:
        raise CorruptData(
            f"{where} was made from {record.sample_shard}, not from shard {record.shard} of the {len(shards)} in the "
            "sample index; extract it again"
        )
    skipped = {sample.key for sample in record.skipped}
    members = samples.members(record.shard)
    tar_keys = [each.key for each in members]
    usable = [(row, key) for row, key in enumerate(tar_keys) if key not in skipped]
    if [key for _, key in usable] != list(targets.keys) or not skipped <= set(tar_keys):
        raise CorruptData(
            f"{where} has {len(targets)} samples and {len(skipped)} skipped ones, which are not the {len(tar_keys)} of "
            f"{record.sample_shard} in its order; extract it again"
        )
    return members, [row for row, _ in usable]
