"""`index.json` of a sample set: which shards it has. Where in a tar its members lie is in the table beside it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from hashlib import sha256
from typing import Annotated, Any, ClassVar, Self

from pydantic import ConfigDict, Field, TypeAdapter

from storage.digests import digest_of, parse_record
from storage.errors import CorruptData, UserError
from storage.samples.table import MAX_TABLE_BYTES, SAMPLES_VERSION, SampleMembers, parse_table
from storage.stores import Store

INDEX_PATH = "index.json"
MAX_INDEX_BYTES = 2**30
"""Largest index that is read or written: that of about four million shards."""

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True, slots=True)
class SampleShardEntry:
    """One tar. An index has one for each, so that it holds 1.2 kB and no list of samples."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: Annotated[str, Field(pattern=r"^samples-[0-9]{6,}\.tar$")]
    """File name beside the index."""
    num_samples: Annotated[int, Field(ge=0)]
    """Samples in it."""
    bytes: Annotated[int, Field(ge=0)]
    """Size of the file."""
    sha256: Digest
    """Digest of the file."""
    table_bytes: Annotated[int, Field(ge=0, le=MAX_TABLE_BYTES)]
    """Size of its member table."""
    table_sha256: Digest
    """Digest of its member table."""
    store: Any = field(default=None, init=False, repr=False, compare=False)
    """The Store whose index this is of; None for an entry that was not loaded."""

    @property
    def table_name(self) -> str:
        """`samples-000000.json`: the member table's file name."""
        return f"{self.name.removesuffix('.tar')}.json"

    @property
    def members(self) -> tuple[SampleMembers, ...]:
        """The tar's samples in its order; the table is read from the store each time."""
        return self.read_members(self.store)

    def read_members(self, store: Store) -> tuple[SampleMembers, ...]:
        """The tar's samples in its order, from the table in `store`.

        Raises:
            CorruptData: If the table is missing, is not the one of the index, or does not fit the tar.
        """
        where = f"{store.url}/{self.table_name}"
        try:
            data = store.read(self.table_name, self.table_bytes)
        except FileNotFoundError as error:
            raise CorruptData(f"member table {where} is missing; restore it or pack the samples again") from error
        found = sha256(data).hexdigest()
        if found != self.table_sha256:
            raise CorruptData(
                f"member table {where} has {len(data)} bytes and sha256 {found[:12]}, the index says "
                f"{self.table_bytes} and {self.table_sha256[:12]}; restore it or pack the samples again"
            )
        return parse_table(data, where, self.num_samples, self.bytes)

    def to_json(self) -> str:
        """The entry's text in the index."""
        return json.dumps({name: getattr(self, name) for name in _STORED}, separators=(",", ":"))


_STORED = tuple(each.name for each in fields(SampleShardEntry) if each.init)
_ENTRY = TypeAdapter(SampleShardEntry)


@dataclass(frozen=True)
class SampleIndex:
    """All shards of a sample set, in order."""

    shards: tuple[SampleShardEntry, ...]
    """The tars, in order; their position is their number."""

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(entry.num_samples for entry in self.shards)

    @property
    def digest(self) -> str:
        """Sha256 of what identifies the data: each shard's name, count and sha256."""
        return digest_of([[entry.name, entry.num_samples, entry.sha256] for entry in self.shards])

    def to_bytes(self) -> bytes:
        """The file's bytes."""
        shards = ",".join(entry.to_json() for entry in self.shards)
        return f'{{"format_version":{SAMPLES_VERSION},"shards":[{shards}]}}'.encode()

    @classmethod
    def load(cls, store: Store) -> Self:
        """Read `index.json`; no member table is read.

        Raises:
            UserError: When there is none (packing did not finish), or for an unknown format version.
            CorruptData: When it does not describe a sample set.
        """
        where = f"{store.url}/{INDEX_PATH}"
        try:
            data = store.read(INDEX_PATH, MAX_INDEX_BYTES)
        except FileNotFoundError:
            raise UserError(
                f"{where} does not exist: {store.url} holds no finished sample set; run `cdp pack-samples`"
            ) from None
        stored = parse_record(data, where, SAMPLES_VERSION, canonical=False)
        try:
            return cls(tuple(_entries(stored, store)))
        except ValueError as error:
            raise CorruptData(f"{where} is no sample index: {error}; pack the samples again") from error


def _entries(stored: dict[str, Any], store: Store) -> Iterator[SampleShardEntry]:
    shards = stored.get("shards")
    if stored.keys() != {"format_version", "shards"} or not isinstance(shards, list):
        raise ValueError(f"it has the fields {sorted(stored)}, expected a list of shards")
    for fields_of_one in shards:
        entry = _ENTRY.validate_python(fields_of_one)
        object.__setattr__(entry, "store", store)
        yield entry
