"""Which samples an epoch has, out of one target store or several."""

from collections.abc import Iterator, Mapping, Sequence, Set
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from storage.digests import digest_of
from storage.errors import UserError
from storage.samples.sample_set import SampleSet
from storage.streaming.held_out import HeldOut
from storage.streaming.order import Ints, StreamConfig, epoch_order, permutation, raw_bits, shard_rows
from storage.streaming.source_checks import check_mixable, check_same_samples, incomplete, read_keys
from storage.targets.store import TargetStore

_FOR_PASSES, _FOR_BUDGET = 1, 2
"""Last numbers of the addresses of random bits; those of an epoch's order end with the epoch."""
_NAMED = 5


@dataclass(frozen=True)
class Source:
    """A sample set with its targets, and how much of it an epoch takes."""

    samples: SampleSet
    targets: TargetStore
    weight: float = 1.0
    """Passes over it in one epoch. 0.5 is a seeded half, in the next epoch the other one; 2 has each sample twice."""
    subset: Path | None = None
    """A text file with the keys of the samples to use, one a line; None uses all."""

    def description(self) -> dict[str, Any]:
        """What decides which targets a student sees: content, not places."""
        manifest, commits = self.targets.manifest, self.targets.commits
        # Of an incomplete store: the same number of samples may be others another time.
        shards = {} if len(commits) == manifest.num_shards else {"shards": digest_of(sorted(commits))}
        return {
            "targets": manifest.fingerprint.digest,
            "num_samples": sum(record.num_samples for record in commits.values()),
            "weight": self.weight,
            "subset": None if self.subset is None else digest_of(sorted(read_keys(self.subset))),
            **shards,
        }


class Mixture:
    """All epochs of one or several sources. May be sent to workers.

    Rows are (shard, row) as in `epoch_order`; shards of all sources are counted in one row, source after source.
    Samples that are `held_out` are in no epoch, whichever source has them, and do not count in a budget.

    Raises:
        FingerprintMismatch: If targets were made from other samples than those beside them, or targets of two sources
            differ in what a student needs of them.
        UserError: If extraction did not finish (see `StreamConfig.allow_incomplete`), or a subset or what is held out
            cannot be used.
    """

    def __init__(self, sources: Sequence[Source], config: StreamConfig, held_out: HeldOut | None = None) -> None:
        self.sources, self.config = tuple(sources), config
        check_mixable([(one.targets.store.url, one.targets.manifest.fingerprint) for one in self.sources])
        self._firsts = np.cumsum([0, *(source.targets.manifest.num_shards for source in self.sources)])
        rows: list[Ints] = []
        self._held_out: list[Ints] = []
        held: set[tuple[str, str]] = set()
        for source, first in zip(self.sources, self._firsts.tolist(), strict=False):
            samples, targets = source.samples, source.targets
            fingerprint = targets.manifest.fingerprint
            check_same_samples(samples.store.url, samples.index.digest, targets.store.url, fingerprint)
            sizes = shard_sizes(source.targets, config.allow_incomplete)
            trained, apart, keys = _usable_rows(source, sizes, first, held_out)
            rows.append(trained)
            # Two sources may have the same samples, which count once.
            named = [(source.samples.index.digest, key) for key in keys]
            self._held_out.append(apart[[name not in held for name in named]])
            held.update(named)
        if held_out is not None:
            stores = [source.targets for source in self.sources]
            held_out.check({key for _, key in held}, sum(map(len, rows)), stores)
        self._rows = _within_budget(rows, config)

    def held_out(self) -> "Mixture":
        """The samples that are held out, each once, in the stored order."""
        other = copy(self)
        other.sources = tuple(replace(source, weight=1.0) for source in self.sources)
        other.config = self.config.model_copy(update={"shuffle_shards": 0})
        other._rows = self._held_out
        return other

    @property
    def num_samples(self) -> int:
        """Samples of each epoch, repeated ones counted each time."""
        return sum(self._counts())

    @property
    def num_steps(self) -> int:
        """Steps of each epoch; the last one may have fewer samples."""
        return -(-self.num_samples // self.config.batch_size)

    @property
    def group_rows(self) -> int:
        """Rows of the shards that are mixed together, on average."""
        num_parts = sum(1 for _ in self._parts(0))
        return -(-self.num_samples * max(1, self.config.shuffle_shards) // num_parts)

    def order(self, epoch: int) -> Ints:
        """`[num_samples, 2]`: the epoch's rows in their global order."""
        return epoch_order(list(self._parts(epoch)), self.config.seed, epoch, self.config.shuffle_shards)

    def locate(self, shard: int) -> tuple[int, int]:
        """The source a shard belongs to, and its number there."""
        number = int(np.searchsorted(self._firsts, shard, side="right")) - 1
        return number, shard - int(self._firsts[number])

    @property
    def is_remote(self) -> bool:
        """Whether anything of it lies in an object store."""
        return any("://" in store.url for each in self.sources for store in (each.samples.store, each.targets.store))

    def _counts(self) -> list[int]:
        """Samples that each source gives to an epoch."""
        return [
            max(1, round(source.weight * len(rows))) if len(rows) else 0
            for source, rows in zip(self.sources, self._rows, strict=True)
        ]

    def _parts(self, epoch: int) -> Iterator[Ints]:
        """The epoch's rows, those of one shard and one pass together."""
        for number, (rows, count) in enumerate(zip(self._rows, self._counts(), strict=True)):
            passes, rest = divmod(count, max(1, len(rows)))
            drawn = np.sort(_turn(len(rows), rest, epoch, raw_bits(self.config.seed, number, _FOR_PASSES)))
            for part in [rows] * passes + [rows[drawn]] * (rest > 0):
                yield from np.split(part, np.flatnonzero(np.diff(part[:, 0])) + 1)


def shard_sizes(targets: TargetStore, allow_incomplete: bool = False) -> dict[int, int]:
    """Usable samples of each committed shard.

    Raises:
        UserError: If shards are not committed yet and that is not allowed, or nothing is committed.
    """
    sizes = {shard: record.num_samples for shard, record in targets.commits.items()}
    planned = targets.manifest.num_shards
    missing = sorted(set(range(planned)) - set(sizes))
    if missing and not allow_incomplete:
        raise incomplete(targets.store.url, planned, missing)
    if not any(sizes.values()):
        raise UserError(
            f"{targets.store.url} has no sample in {len(sizes)} of {planned} shards committed: nothing can be read; "
            "run `cdp extract-teacher` to finish it, or extract from other samples"
        )
    return sizes


def _usable_rows(
    source: Source, sizes: Mapping[int, int], first: int, held_out: HeldOut | None
) -> tuple[Ints, Ints, list[str]]:
    """Rows of a source that are trained on, rows that are held out, both by shard and row, and the keys of these.

    A share is held out of the source's subset. Listed keys are held out of its whole store: they may be others than
    those of the subset.
    """
    rows = [shard_rows(first + shard, size) for shard, size in sorted(sizes.items())]
    apart, held_keys = [rows[0][:0]], list[str]()
    if source.subset is None and held_out is None:
        return np.concatenate(rows), apart[0], held_keys
    wanted, found = None if source.subset is None else read_keys(source.subset), set[str]()
    for number, shard in enumerate(sorted(sizes)):
        skipped = {sample.key for sample in source.targets.commits[shard].skipped}
        keys = [members.key for members in source.samples.members(shard) if members.key not in skipped]
        used = np.array([wanted is None or key in wanted for key in keys], dtype=bool)
        held = np.array([held_out is not None and key in held_out for key in keys], dtype=bool)
        if held_out is not None and held_out.share:
            held &= used
        held_keys += [keys[row] for row in np.flatnonzero(held)]
        apart.append(rows[number][held])
        rows[number] = rows[number][used & ~held]
        if wanted is not None:
            found.update(wanted.intersection(keys))
    if wanted is not None:
        _check_found(source, wanted, found)
    return np.concatenate(rows), np.concatenate(apart), held_keys


def _check_found(source: Source, wanted: Set[str], found: Set[str]) -> None:
    if unknown := sorted(wanted - found):
        names = ", ".join(unknown[:_NAMED]) + (", ..." if len(unknown) > _NAMED else "")
        raise UserError(
            f"subset {source.subset} names {len(wanted)} samples, {source.targets.store.url} has no targets for "
            f"{len(unknown)} of them: {names}; correct the list, or leave them out"
        )


def _within_budget(rows: list[Ints], config: StreamConfig) -> list[Ints]:
    """`config.max_samples` of the rows of all sources, in their order."""
    ends = np.cumsum([len(each) for each in rows])
    if config.max_samples is None or config.max_samples >= ends[-1]:
        return rows
    drawn = np.sort(permutation(raw_bits(config.seed, 0, _FOR_BUDGET), int(ends[-1]))[: config.max_samples])
    return [
        each[drawn[(drawn >= end - len(each)) & (drawn < end)] - (end - len(each))]
        for each, end in zip(rows, ends, strict=True)
    ]


def _turn(size: int, count: int, epoch: int, bits: np.random.PCG64) -> Ints:
    """`count` different numbers below `size` for each epoch, those that earlier epochs left first."""
    taken = left = np.zeros(0, dtype=np.int64)
    for _ in range(epoch + 1 if count else 0):
        taken, left = left[:count], left[count:]
        if len(taken) < count:
            fresh = permutation(bits, size)
            again = np.isin(fresh, taken)
            # What this epoch has already comes last in the new pass.
            fresh = np.concatenate([taken, fresh[~again], fresh[again]])
            taken, left = fresh[:count], fresh[count:]
    return taken
