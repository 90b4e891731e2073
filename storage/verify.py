"""Checking every byte of a target store and of its samples; a fault is a finding, not the end."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from storage.codecs.sinks import packed_mask_bytes
from storage.errors import UserError
from storage.join import joined_rows
from storage.manifest import MANIFEST_PATH, Manifest
from storage.samples import SampleIndex, SampleShard, SampleShardEntry
from storage.stores import Store, open_store
from storage.targets import CommitRecord, TargetShard
from storage.targets.commits import COMMITS, committed_shards, measure_files

_Result = TypeVar("_Result")

Progress = Callable[[int, int, int], None]
"""Called with (shards done, shards to do, bytes read so far)."""


@dataclass(frozen=True)
class Finding:
    """One fault."""

    shard: str
    """Number of the target shard, name of the tar, or `-` for the store itself."""
    file: str
    """Path in the shard's folder, or in the store."""
    found: str
    """What is there."""
    expected: str
    """What was committed."""


@dataclass(frozen=True)
class VerifyReport:
    """What was read and what was wrong."""

    targets_url: str
    samples_url: str | None
    num_planned: int
    """Shards that a finished extraction has."""
    num_committed: int
    """Shards committed, and so checked; the others are unfinished work, not faults."""
    num_files: int
    num_bytes: int
    num_samples: int
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether every byte is what was committed."""
        return not self.findings


def verify(
    targets_url: str | Path, samples_url: str | Path | None = None, progress: Progress | None = None
) -> VerifyReport:
    """Read everything and compare it with what was committed.

    Args:
        targets_url: The target store.
        samples_url: The sample set; when given, its digests and its agreement with the targets are checked.
        progress: Called after each shard.

    Raises:
        UserError: If the store has no manifest: then there is nothing to compare with.
    """
    run = _Run(open_store(targets_url), progress)
    if not run.store.exists(MANIFEST_PATH):
        Manifest.load(run.store)
    index = None
    if samples_url is not None:
        samples = open_store(samples_url)
        index = run.guarded("-", "index.json", lambda: SampleIndex.load(samples))
    manifest = run.guarded("-", "manifest.json", lambda: Manifest.load(run.store))
    paths = committed_shards(run.store.list(COMMITS))
    run.num_to_do = len(paths) + (len(index.shards) if index else 0)
    if manifest and index:
        run.compare("-", "index.json", index.digest, manifest.fingerprint.samples)
        run.compare("-", "index.json", f"{len(index.shards)} shards", f"{manifest.num_shards} shards")
    for shard, path in paths.items():
        run.check_shard(manifest, shard, path, index)
        run.advance()
    for entry in index.shards if index else ():
        run.check_tar(samples, entry)
        run.advance()
    return VerifyReport(
        targets_url=run.store.url,
        samples_url=None if samples_url is None else samples.url,
        num_planned=manifest.num_shards if manifest else len(paths),
        num_committed=len(paths),
        num_files=run.num_files,
        num_bytes=run.num_bytes,
        num_samples=run.num_samples,
        findings=tuple(run.findings),
    )


class _Run:
    """Counts and findings of one verification."""

    def __init__(self, store: Store, progress: Progress | None) -> None:
        self.store, self._progress = store, progress
        self.findings: list[Finding] = []
        self.num_files = self.num_bytes = self.num_samples = self.num_to_do = self._num_done = 0

    def guarded(self, shard: str, file: str, action: Callable[[], _Result]) -> _Result | None:
        """The action's result; None and a finding if it meets damaged data."""
        try:
            return action()
        except (UserError, OSError) as error:
            self.findings.append(Finding(shard, file, str(error), "what was committed"))
            return None

    def compare(self, shard: str, file: str, found: object, expected: object) -> None:
        """A finding unless both are equal."""
        if found != expected:
            self.findings.append(Finding(shard, file, str(found), str(expected)))

    def advance(self) -> None:
        """Tell the caller."""
        self._num_done += 1
        if self._progress:
            self._progress(self._num_done, self.num_to_do, self.num_bytes)

    def check_shard(self, manifest: Manifest | None, number: int, path: str, index: SampleIndex | None) -> None:
        """One commit record, its files, and all that they decode to."""
        shard, store = str(number), self.store
        record = self.guarded(shard, path, lambda: CommitRecord.parse(store.read(path), path, number))
        folder = self.guarded(shard, record.path, lambda: store.local(record.path)) if record else None
        if record is None or folder is None:
            return
        found, faults = measure_files(folder), len(self.findings)
        self.num_files += len(found)
        self.num_bytes += sum(num_bytes for num_bytes, _ in found.values())
        for file in sorted(found.keys() | record.files.keys()):
            self.compare(shard, file, found.get(file, "no such file"), record.files.get(file, "no such file"))
        if manifest is None:
            return
        self.compare(shard, path, record.fingerprint, manifest.fingerprint.digest)
        if len(self.findings) == faults:
            # Only then is there something to decode that the digests have not condemned.
            self.guarded(shard, record.path, lambda: self._decode(manifest, record, index))

    def check_tar(self, samples: Store, entry: SampleShardEntry) -> None:
        """Size and digest of one sample shard."""

        def check() -> None:
            with SampleShard.open(samples, entry) as tar:
                tar.verify()

        self.num_files += 1
        self.num_bytes += entry.bytes
        self.guarded(entry.name, entry.name, check)

    def _decode(self, manifest: Manifest, record: CommitRecord, index: SampleIndex | None) -> None:
        """Every row and every map, one at a time."""
        targets = TargetShard(self.store, manifest, record)
        if index:
            joined_rows(index, targets)
        shard, codec = str(record.shard), manifest.fingerprint.map_codec
        references = 0
        for row in range(len(targets)):
            sample, _ = targets.read(row, with_maps=False)
            ids, num_answers = sample.logits.ids_RK, int(sample.answer_mask.sum())
            self.compare(
                shard,
                "logit_offsets",
                f"{len(ids)} rows of {sample.key}",
                f"{num_answers} rows of {sample.key}",
            )
            in_range = not len(ids) or bool((ids >= 0).all() and (ids < manifest.vocab_size).all())
            self.compare(shard, "logit_ids", in_range, True)
            references += sample.map_row is not None
        self.compare(shard, "map_rows", references, record.num_map_references)
        for map_row, num_tokens in enumerate(targets.map_num_tokens):
            entry = targets.read_map(map_row)
            sizes = (entry.codes_LE.shape[1], entry.keep_masks.shape[1])
            expected = (codec.num_codes(num_tokens), packed_mask_bytes(num_tokens, codec.causal))
            self.compare(shard, "map_code_offsets", sizes, expected)
        self.num_samples += len(targets)
