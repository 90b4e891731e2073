"""Checks of a sample set: sizes and digests of tars and tables, and every sample where its table says."""

from collections.abc import Container

from storage.errors import CorruptData
from storage.integrity.checks import Checks, size_of
from storage.samples.index import SampleIndex, SampleShardEntry
from storage.samples.shard import SampleShard
from storage.stores import Store


class SampleChecks:
    """Checks one sample set."""

    def __init__(self, checks: Checks, samples: Store) -> None:
        self._checks, self._samples = checks, samples

    def check_tars(self, index: SampleIndex, chosen: Container[str]) -> None:
        """Sizes of all sample shards, and all that the chosen ones hold."""
        stored = self._samples.sizes()
        for entry in index.shards:
            right = self._checks.compare(entry.name, entry.name, size_of(stored, entry.name), f"{entry.bytes} bytes")
            table = entry.table_name
            if not self._checks.compare(entry.name, table, size_of(stored, table), f"{entry.table_bytes} bytes"):
                self._doubt_index(table)
                right = False
            if entry.name in chosen:
                if right:
                    self._check_tar(entry)
                self._checks.advance()

    def _doubt_index(self, table: str) -> None:
        """Where a table is not what the index says of it, either may be damaged: no other digest holds these words."""
        self._checks.compare(
            "samples", "index.json", f"another size or sha256 of {table}", f"those of {table}, or that is damaged"
        )

    def _check_tar(self, entry: SampleShardEntry) -> None:
        """Sizes and digests of one sample shard and its table, and every sample where the table says."""
        members = self._checks.guarded(entry.name, entry.table_name, lambda: entry.read_members(self._samples))
        if members is None:
            self._doubt_index(entry.table_name)

        def check() -> None:
            with (
                self._samples.as_stored(entry.name) as here,
                SampleShard(here.local(entry.name), entry, members or ()) as tar,
            ):
                tar.verify()
                # The tar is right: what cannot be read now is where the table misleads.
                if members is not None:
                    self._checks.guarded(entry.name, entry.table_name, lambda: _read_all(tar))

        self._checks.num_files += 2
        self._checks.num_bytes += entry.bytes + entry.table_bytes
        self._checks.guarded(entry.name, entry.name, check)


def written_index(samples: Store) -> SampleIndex:
    """The index, which must be byte for byte as it was written: its digest leaves out sizes and member tables."""
    index = SampleIndex.load(samples)
    if index.to_bytes() != samples.read("index.json"):
        raise CorruptData(f"{samples.url}/index.json is not as it was written; restore it or pack the samples again")
    return index


def _read_all(tar: SampleShard) -> None:
    for row in range(len(tar)):
        tar.read(row)
