"""Checks of a sample set: sizes and digests of tars and tables, and every sample where its table says."""

from collections import deque
from collections.abc import Container

from storage.errors import CorruptData
from storage.integrity.checks import Checks, size_of
from storage.samples.index import INDEX_PATH, MAX_INDEX_BYTES
from storage.samples.sample_set import SampleSet
from storage.samples.shard_reader import SampleShard
from storage.stores import Store


def check_tars(checks: Checks, samples: SampleSet, chosen: Container[int]) -> None:
    """Sizes of all sample shards, and all that the chosen ones hold."""
    stored = samples.store.sizes()
    for number, entry in enumerate(samples.index.shards):
        tar, table = entry.name, entry.table_name
        tar_fits = checks.compare(tar, tar, size_of(stored, tar), f"{entry.bytes} bytes")
        table_fits = checks.compare(tar, table, size_of(stored, table), f"{entry.table_bytes} bytes")
        if not table_fits:
            _doubt_index(checks, table)
        if number in chosen:
            if tar_fits and table_fits:
                _check_tar(checks, samples, number)
            checks.task.advance()


def _doubt_index(checks: Checks, table: str) -> None:
    """Where a table is not what the index says of it, either may be damaged: no other digest holds these words."""
    checks.fault("samples", INDEX_PATH, f"another size or sha256 of {table}", f"those of {table}, or that is damaged")


def _check_tar(checks: Checks, samples: SampleSet, number: int) -> None:
    """Sizes and digests of one sample shard and its table, and every sample where the table says."""
    entry = samples.index.shards[number]
    members = checks.guarded(entry.name, entry.table_name, lambda: samples.members(number))
    if members is None:
        _doubt_index(checks, entry.table_name)

    def check(here: Store) -> None:
        with SampleShard(here.local(entry.name), entry, members or ()) as tar:
            tar.verify()
            # The tar is right: what cannot be read now is where the table misleads.
            if members is not None:
                checks.guarded(entry.name, entry.table_name, lambda: deque(map(tar.read, range(len(tar))), maxlen=0))

    checks.num_files += 2
    checks.num_bytes += entry.bytes + entry.table_bytes
    checks.guarded_read(samples.store, entry.name, entry.name, check)


def written_samples(store: Store) -> SampleSet:
    """The sample set, whose index must be as it was written: its digest leaves out sizes and member tables."""
    samples = SampleSet.open(store)
    if samples.index.to_bytes() != store.read(INDEX_PATH, MAX_INDEX_BYTES):
        raise CorruptData(f"{store.url}/{INDEX_PATH} is not as it was written; restore it or pack the samples again")
    return samples
