"""Commit records: the file that makes a shard exist, and the race to write it."""

import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from storage.digests import canonical_json, digest_of, parse_record
from storage.errors import CorruptData, FingerprintMismatch
from storage.stores import Store
from storage.targets.file_table import StoredFiles
from storage.targets.manifest import FORMAT_VERSION, FORMAT_VERSIONS, MAX_SHARDS, Manifest

READS_AT_ONCE = 32
READ_BATCH = 1024
COMMITS = "commits"
SHARDS = "shards"
_COMMIT_NAME = re.compile(rf"{COMMITS}/([0-9]{{6,}})\.json")

_REMEDY = "the record is damaged; run `cdp verify --repair` on the store, then extract again"
_Count = Annotated[int, Field(ge=0, lt=2**63)]


class Committed(BaseModel):
    """A folder of the store that exists because this record does: what every record says."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    format_version: int
    """Layout of the store, see FORMAT.md."""
    path: str
    """The folder in the store; its name holds the start of the digest."""
    files: StoredFiles
    """Path in the folder -> (bytes, sha256); nothing else is in it."""
    manifest: str
    """Digest of the manifest."""
    digest: str
    """Sha256 of all fields but this and `path`."""

    @property
    def record_path(self) -> str:
        """Where the record lies."""
        raise NotImplementedError

    def folder_for(self, digest: str) -> str:
        """The folder that a record of this digest names: two writers of different content never share one."""
        raise NotImplementedError

    @classmethod
    def build(cls, format_version: int = FORMAT_VERSION, **content: Any) -> Self:
        """A record of this content, with digest and path worked out."""
        draft = cls(format_version=format_version, path="", digest="", **content)
        digest = draft.content_digest()
        return draft.model_copy(update={"digest": digest, "path": draft.folder_for(digest)})

    def content_digest(self) -> str:
        """The digest these fields should have."""
        return digest_of(self.model_dump(mode="json", exclude={"digest", "path"}))

    def to_bytes(self) -> bytes:
        """The file's bytes."""
        return canonical_json(self.model_dump(mode="json"))

    @classmethod
    def load(cls, store: Store, path: str) -> Self:
        """The record at `path`, which must be byte for byte what was committed under this name.

        Raises:
            FileNotFoundError: If there is none.
            CorruptData: If it is not.
            UserError: For another format version.
        """
        where = f"{store.url}/{path}"
        data = store.read(path)
        try:
            record = cls.model_validate(parse_record(data, where, *FORMAT_VERSIONS))
        except ValidationError as error:
            raise CorruptData(f"{where} is no commit record: {error}; {_REMEDY}") from error
        digest = record.content_digest()
        found, expected = (record.record_path, record.digest, record.path), (path, digest, record.folder_for(digest))
        if found != expected or record.to_bytes() != data:
            raise CorruptData(
                f"{where} says it is {found[0]} with digest {record.digest[:12]} and folder {record.path}; its content "
                f"gives {path}, {digest[:12]}, {expected[2]}: {_REMEDY}"
            )
        return record


@dataclass(frozen=True)
class SkippedSample:
    """A sample without targets, and why."""

    key: str
    id: str
    """The conversation's own id; the key is the sample's in its tar."""
    reason: str
    """A short name to count by, such as `broken_image`; FORMAT.md lists all."""
    detail: str
    """What was found."""


class CommitRecord(Committed):
    """What a shard consists of; a shard without this file does not exist."""

    shard: int = Field(ge=0, lt=MAX_SHARDS)
    """The shard's number."""
    sample_shard: str
    """The tar these are the targets of."""
    num_samples: _Count
    """Samples with targets, in the tar's order."""
    num_tokens: _Count
    num_answer_rows: _Count
    """Tokens and answer rows of all samples."""
    num_cut_samples: _Count
    num_cut_answer_tokens: _Count
    """Samples that lost answer tokens to `max_length`, and how many."""
    num_maps: _Count
    """Stored maps (each of all captured layers)."""
    num_map_tokens: _Count
    num_map_squares: _Count
    """Sums of N and of N*N over the stored maps."""
    num_map_references: _Count
    """Samples with a map; what exceeds `num_maps` is saved by sharing."""
    num_referenced_tokens: _Count
    num_referenced_squares: _Count
    """Sums of N and of N*N over these references."""
    num_turned: _Count
    """Samples with a picture that EXIF data turn; the fingerprint's `images.exif` says whether it was turned."""
    skipped: tuple[SkippedSample, ...]
    """Samples of the tar without targets."""

    @property
    def record_path(self) -> str:
        """`commits/000000.json`."""
        return commit_path(self.shard)

    @property
    def repeated_counts(self) -> dict[str, int | str]:
        """What the attributes of the shard's group repeat."""
        names = ("shard", "sample_shard", "num_samples", "num_tokens", "num_answer_rows", "num_maps")
        return {name: getattr(self, name) for name in (*names, "num_map_references")}

    def folder_for(self, digest: str) -> str:
        """`shards/000000-0123456789abcdef.zarr`."""
        return f"{SHARDS}/{self.shard:06d}-{digest[:16]}.zarr"


def commit_path(shard: int) -> str:
    """The record's file."""
    return f"{COMMITS}/{shard:06d}.json"


_Record = TypeVar("_Record", bound=Committed)


def publish(store: Store, staged: Path, record: _Record) -> _Record:
    """Move a staged folder into place and commit it, unless another extractor was first.

    Returns:
        The record that counts. If it is another one than ours, our folder is gone.
    """
    store.put_tree(staged, record.path)
    if store.create(record.record_path, record.to_bytes()):
        return record
    committed = type(record).load(store, record.record_path)
    if committed.path != record.path:
        # Nobody can commit our folder any more, so nobody needs it.
        store.remove_tree(record.path)
    return committed


def read_store(store: Store) -> tuple[Manifest, dict[int, CommitRecord]]:
    """The manifest, and all committed shards by number, in order.

    Raises:
        UserError: If there is no manifest, or one of another format version.
        CorruptData: If the manifest or a record is damaged.
        FingerprintMismatch: If a shard was committed under another manifest.
    """
    manifest = Manifest.load(store)
    commits = {}
    for record in iter_commits(store, committed_shards(store.list(COMMITS))):
        commits[record.shard] = record
        if record.manifest != manifest.digest:
            raise FingerprintMismatch(
                f"shard {record.shard} of {store.url} was committed under manifest {record.manifest[:12]}, not the "
                f"store's {manifest.digest[:12]}; restore the manifest, or `cdp verify --repair` and extract it again"
            )
        if record.format_version != manifest.format_version:
            found = f"the record of shard {record.shard} of {store.url} has format version {record.format_version}"
            raise CorruptData(f"{found}, the manifest {manifest.format_version}; run `cdp verify --repair`")
        if record.shard >= manifest.num_shards:
            found = f"{store.url} has a record of shard {record.shard}"
            raise CorruptData(f"{found}, the manifest says {manifest.num_shards} shards; run `cdp verify --repair`")
    return manifest, commits


def iter_commits(store: Store, paths: Mapping[int, str]) -> Iterator[CommitRecord]:
    """The records at `paths` (as of `committed_shards`), in their order; only a few are in memory at a time.

    Many are fetched at once: one by one, a store of 100,000 shards behind a network would take an hour.

    Raises:
        CorruptData: If a record is damaged, naming it.
    """
    left = iter(paths.values())
    with ThreadPoolExecutor(READS_AT_ONCE) as readers:
        while batch := list(islice(left, READ_BATCH)):
            yield from readers.map(partial(CommitRecord.load, store), batch)


def committed_shards(paths: Iterable[str]) -> Mapping[int, str]:
    """Shard numbers and record paths among `paths`, in order of the numbers."""
    matches = sorted((int(match[1]), match[0]) for match in map(_COMMIT_NAME.fullmatch, paths) if match)
    # Of `000001` and `0000001` only the first is a record's name.
    return {number: path for number, path in matches if path == commit_path(number)}
