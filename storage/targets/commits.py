"""Commit records: the file that makes a shard exist, and the race to write it."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from storage.digests import canonical_json, digest_of, file_sha256
from storage.errors import CorruptData
from storage.manifest import FORMAT_VERSION, parse_record
from storage.records import SkippedSample
from storage.stores import Store

COMMITS = "commits"
SHARDS = "shards"
_COMMIT_NAME = re.compile(rf"{COMMITS}/([0-9]{{6,}})\.json")
_SHARD_FOLDER = re.compile(rf"{SHARDS}/([0-9]{{6,}})-[0-9a-f]{{16}}\.zarr/")


class CommitRecord(BaseModel):
    """What a shard consists of; a shard without this file does not exist."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int
    """Layout of the store, see FORMAT.md."""
    shard: int = Field(ge=0)
    """The shard's number."""
    path: str
    """The shard's folder in the store; its name holds the start of the digest."""
    sample_shard: str
    """The tar these are the targets of."""
    num_samples: int = Field(ge=0)
    """Samples with targets, in the tar's order."""
    num_tokens: int = Field(ge=0)
    """Tokens of all samples."""
    num_answer_rows: int = Field(ge=0)
    """Answer rows of all samples."""
    num_maps: int = Field(ge=0)
    """Stored maps (each of all captured layers)."""
    num_map_references: int = Field(ge=0)
    """Samples with a map; what exceeds `num_maps` is saved by sharing."""
    num_referenced_tokens: int = Field(ge=0)
    """Sum of N over the map references."""
    num_referenced_squares: int = Field(ge=0)
    """Sum of N*N over the map references."""
    files: dict[str, tuple[int, str]]
    """Path in the shard's folder -> (bytes, sha256); nothing else is in it."""
    skipped: tuple[SkippedSample, ...]
    """Samples of the tar without targets."""
    fingerprint: str
    """Digest of the manifest's fingerprint."""
    digest: str
    """Sha256 of all fields but this and `path`."""

    @classmethod
    def build(cls, **content: Any) -> Self:
        """A record of this content, with digest and path worked out."""
        draft = cls(format_version=FORMAT_VERSION, path="", digest="", **content)
        digest = draft.content_digest()
        return draft.model_copy(update={"digest": digest, "path": shard_path(draft.shard, digest)})

    def content_digest(self) -> str:
        """The digest these fields should have."""
        return digest_of(self.model_dump(mode="json", exclude={"digest", "path"}))

    def to_bytes(self) -> bytes:
        """The file's bytes."""
        return canonical_json(self.model_dump(mode="json"))

    @classmethod
    def parse(cls, data: bytes, where: str, shard: int) -> Self:
        """The record in `data`, which must be byte for byte what was committed for `shard`.

        Raises:
            CorruptData: If it is not.
            UserError: For another format version.
        """
        fields = parse_record(data, where, FORMAT_VERSION)
        try:
            record = cls.model_validate(fields)
        except ValidationError as error:
            raise CorruptData(f"{where} is no commit record: {error}; {_REMEDY}") from error
        digest = record.content_digest()
        expected = (shard, digest, shard_path(shard, digest))
        if (record.shard, record.digest, record.path) != expected or record.to_bytes() != data:
            raise CorruptData(
                f"{where} says shard {record.shard}, digest {record.digest[:12]}, path {record.path}; "
                f"its content gives {shard}, {digest[:12]}, {expected[2]}: {_REMEDY}"
            )
        return record


_REMEDY = "the record is damaged; run `cdp verify`, then remove it and extract this shard again"


def shard_path(shard: int, digest: str) -> str:
    """Folder of a shard: two extractors with different results never write into each other's files."""
    return f"{SHARDS}/{shard:06d}-{digest[:16]}.zarr"


def commit_path(shard: int) -> str:
    """The record's file."""
    return f"{COMMITS}/{shard:06d}.json"


def measure_files(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and sha256 of every file below `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): (path.stat().st_size, file_sha256(path)) for path in files}


def publish(store: Store, staged: Path, record: CommitRecord) -> CommitRecord:
    """Move a staged shard into place and commit it, unless another extractor was first.

    Returns:
        The record that counts. If it is another one than ours, our folder is gone.
    """
    store.put_tree(staged, record.path)
    path = commit_path(record.shard)
    if store.create(path, record.to_bytes()):
        return record
    committed = CommitRecord.parse(store.read(path), f"{store.url}/{path}", record.shard)
    if committed.path != record.path:
        store.remove_tree(record.path)
    return committed


def read_commits(store: Store) -> dict[int, CommitRecord]:
    """All committed shards by number, in order.

    Raises:
        CorruptData: If a record is damaged, naming it.
    """
    return {
        shard: CommitRecord.parse(store.read(path), f"{store.url}/{path}", shard)
        for shard, path in committed_shards(store.list(COMMITS)).items()
    }


def committed_shards(paths: Iterable[str]) -> Mapping[int, str]:
    """Shard numbers and record paths among `paths`, in order of the numbers."""
    matches = [match for match in map(_COMMIT_NAME.fullmatch, paths) if match]
    return {int(match[1]): match[0] for match in sorted(matches, key=lambda match: int(match[1]))}


def clean_partials(store: Store) -> int:
    """Remove what dead runs left: staging folders, and folders of shards that another folder was committed
    for.

    Call it from the one driver of an extraction, before it starts: a live extractor's staging would go too.

    Returns:
        How many files and folders were removed.
    """
    count = store.remove_partials()
    commits = read_commits(store)
    folders = {match[0]: int(match[1]) for match in map(_SHARD_FOLDER.match, store.list(SHARDS)) if match}
    for folder, shard in folders.items():
        path = folder.rstrip("/")
        if shard in commits and commits[shard].path != path:
            store.remove_tree(path)
            count += 1
    return count
