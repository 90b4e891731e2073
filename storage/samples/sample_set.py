"""A finished sample set: its store and its index, and how its shards are opened."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Self

from storage.errors import CorruptData
from storage.samples.index import SampleIndex
from storage.samples.shard_reader import RESTORE, SampleShard
from storage.samples.table import SampleMembers, parse_table
from storage.stores import FileInfo, Store, open_store


class _Holder:
    """Keeps a downloaded tar from being evicted as long as it lives."""


@dataclass(frozen=True)
class SampleSet:
    """A sample set with its index as it was when opened. May be sent to workers."""

    store: Store
    index: SampleIndex

    @classmethod
    def open(cls, url: str | Path | Store) -> Self:
        """Read the index; errors are those of `SampleIndex.load`."""
        store = open_store(url)
        return cls(store, SampleIndex.load(store))

    def members(self, number: int) -> tuple[SampleMembers, ...]:
        """The samples of a tar in its order; its member table is read each time.

        Raises:
            CorruptData: If the table is missing, is not the one of the index, or does not fit the tar.
        """
        entry = self.index.shards[number]
        where = f"{self.store.url}/{entry.table_name}"
        try:
            data = self.store.read(entry.table_name, entry.table_bytes)
        except FileNotFoundError as error:
            raise CorruptData(f"member table {where} is missing; {RESTORE}") from error
        if (found := sha256(data).hexdigest()) != entry.table_sha256:
            raise CorruptData(
                f"member table {where} has {len(data)} bytes and sha256 {found[:12]}, the index says "
                f"{entry.table_bytes} and {entry.table_sha256[:12]}; {RESTORE}"
            )
        return parse_table(data, where, entry.num_samples, entry.bytes)

    def shard(self, number: int, members: tuple[SampleMembers, ...] | None = None) -> SampleShard:
        """Open a tar. Its size is compared with the index; its digest only by `verify` and after a download.

        `members` are what `self.members` returned for it, and read if not given.

        Raises:
            CorruptData: If the file is missing or has another size, or its member table is not the index's.
        """
        entry, holder = self.index.shards[number], _Holder()
        members = self.members(number) if members is None else members
        try:
            path = self.store.local(entry.name, {"": FileInfo(entry.bytes, entry.sha256)}, holder)
        except FileNotFoundError as error:
            raise CorruptData(f"sample shard {self.store.url}/{entry.name} is missing; {RESTORE}") from error
        if (found := path.stat().st_size) != entry.bytes:
            raise CorruptData(f"sample shard {path} has {found} bytes, the index says {entry.bytes}; {RESTORE}")
        return SampleShard(path, entry, members, holder)
