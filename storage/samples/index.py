"""`index.json` of a sample set: which shards it has. Where in a tar its members lie is in the table beside it."""

import json
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter

from storage.digests import digest_of, parse_record
from storage.errors import CorruptData
from storage.samples.table import MAX_TABLE_BYTES, MIN_ENTRY_BYTES, SAMPLES_VERSION
from storage.stores import Store
from storage.stores.recognize import SAMPLE_SET, read_sign

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
    num_samples: Annotated[int, Field(ge=0, le=MAX_TABLE_BYTES // MIN_ENTRY_BYTES)]
    bytes: Annotated[int, Field(ge=0, lt=2**63)]
    sha256: Digest
    table_bytes: Annotated[int, Field(ge=0, le=MAX_TABLE_BYTES)]
    table_sha256: Digest
    """Size and digest of its member table; the two before are the tar's own."""

    @property
    def table_name(self) -> str:
        """`samples-000000.json`: the member table's file name."""
        return f"{self.name.removesuffix('.tar')}.json"

    def to_json(self) -> str:
        """The entry's text in the index."""
        return json.dumps({name: getattr(self, name) for name in self.__slots__}, separators=(",", ":"))


@dataclass(frozen=True)
class SampleIndex:
    """All shards of a sample set."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    shards: tuple[SampleShardEntry, ...]
    """In order: their position is their number."""

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
    def load(cls, store: Store) -> "SampleIndex":
        """Read `index.json`; no member table is read.

        Raises:
            UserError: When there is none (packing did not finish), or for an unknown format version.
            CorruptData: When it does not describe a sample set.
        """
        where = f"{store.url}/{INDEX_PATH}"
        data = read_sign(store, INDEX_PATH, MAX_INDEX_BYTES, SAMPLE_SET)
        stored = parse_record(data, where, SAMPLES_VERSION, canonical=False)
        del stored["format_version"]
        try:
            return _INDEX.validate_python(stored)
        except ValueError as error:
            raise CorruptData(f"{where} is no sample index: {error}; pack the samples again") from error


_INDEX = TypeAdapter(SampleIndex)
