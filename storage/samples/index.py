"""`index.json` of a sample set: which shards it has, and where in them each member lies."""

from typing import NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from storage.digests import digest_of
from storage.errors import CorruptData, UserError
from storage.manifest import parse_record
from storage.samples.members import BLOCK_BYTES, MAX_MEMBER_BYTES, is_key
from storage.stores import Store

INDEX_PATH = "index.json"
INDEX_VERSION = 1
MAX_INDEX_BYTES = 2**30
"""Largest index that is read: that of about ten million samples; larger data is packed as several sets."""


class SampleMembers(NamedTuple):
    """Where one sample lies in its tar."""

    key: str
    spans: tuple[tuple[int, int], ...]
    """(offset of the data, bytes) of each member in tar order: the JSON, then the images."""
    crc32: int
    """zlib.crc32 over the data of the members in this order; checked whenever the sample is read."""


class SampleShardEntry(BaseModel):
    """One tar."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^samples-[0-9]{6,}\.tar$")
    """File name beside the index."""
    num_samples: int = Field(ge=0)
    """Samples in it."""
    bytes: int = Field(ge=0)
    """Size of the file."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Digest of the file."""
    members: tuple[SampleMembers, ...]
    """Its samples in tar order."""

    @model_validator(mode="after")
    def _spans_lie_in_the_file(self) -> Self:
        if len(self.members) != self.num_samples:
            raise ValueError(f"{self.name} lists {len(self.members)} samples, num_samples is {self.num_samples}")
        end = 0
        for key, spans, _ in self.members:
            if not is_key(key) or not spans:
                raise ValueError(f"{self.name} has a sample {key!r} with {len(spans)} members")
            for offset, num_bytes in spans:
                if num_bytes > MAX_MEMBER_BYTES:
                    raise ValueError(f"{self.name}: member of {key} of {num_bytes} bytes, at most {MAX_MEMBER_BYTES}")
                if offset % BLOCK_BYTES or offset < end + BLOCK_BYTES or num_bytes < 0:
                    raise ValueError(f"{self.name}: member of {key} at {offset} overlaps or is not aligned")
                end = offset + num_bytes
        if end > self.bytes:
            raise ValueError(f"{self.name} has {self.bytes} bytes, its members end at {end}")
        return self


class SampleIndex(BaseModel):
    """All shards of a sample set, in order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = INDEX_VERSION
    """Version of this file's layout."""
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
        return self.model_dump_json().encode()

    @classmethod
    def load(cls, store: Store) -> Self:
        """Read `index.json`.

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
        fields = parse_record(data, where, INDEX_VERSION, canonical=False)
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise CorruptData(f"{where} is no sample index: {error}; pack the samples again") from error
