"""Checking a target store and its samples byte by byte; a fault is a finding, not the end."""

import errno
import math
import random
import re
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.codecs.maps import MapCodec
from storage.errors import CorruptData, StoreUnavailable, UserError
from storage.integrity.findings import Finding, VerifyReport
from storage.samples.index import SampleIndex, SampleShardEntry
from storage.samples.shard import SampleShard
from storage.stores import Store, open_store
from storage.streaming.join import joined_rows
from storage.targets.commits import (
    COMMITS,
    SHARDS,
    CommitRecord,
    Committed,
    commit_path,
    committed_shards,
    measure_files,
)
from storage.targets.manifest import MANIFEST_PATH, Manifest
from storage.targets.shard import TargetShard
from storage.targets.teacher import TEACHER, TEACHER_RECORD, TeacherRecord

_Result = TypeVar("_Result")
_Item = TypeVar("_Item")
_Record = TypeVar("_Record", bound=Committed)
_SHARD_FOLDER = re.compile(rf"({SHARDS}/([0-9]{{6,}})-[0-9a-f]{{16}}\.zarr)/")
_REPORT = "reports/extraction.json"

Progress = Callable[[int, int, int], None]
"""Called with (shards done, shards to do, bytes read so far)."""


def verify(
    targets_url: str | Path,
    samples_url: str | Path | None = None,
    progress: Progress | None = None,
    *,
    percent: float = 100.0,
    seed: int = 0,
) -> VerifyReport:
    """Read everything, or a share, and compare it with what was committed.

    Args:
        targets_url: The target store.
        samples_url: The sample set; when given, its digests and its agreement with the targets are checked.
        progress: Called after each shard that is read.
        percent: Share of the shards that is read; they are drawn by `seed`. Manifest, records, `teacher/`, presence and
            sizes of all files are checked always.
        seed: Another one reads other shards.

    Raises:
        UserError: If the store has no manifest, or one of another format version: nothing to compare with.
        StoreUnavailable: If the store does not answer; nothing is known then.
    """
    if not 0 < percent <= 100:
        raise UserError(f"{percent} % of the shards cannot be read, give more than 0 and at most 100")
    run = _Run(open_store(targets_url), progress)
    samples = None if samples_url is None else open_store(samples_url)
    if not run.store.exists(MANIFEST_PATH):
        Manifest.load(run.store)
    index = run.guarded("samples", "index.json", lambda: _written_index(samples)) if samples else None
    manifest = run.guarded("-", MANIFEST_PATH, lambda: Manifest.load(run.store), refuse=True)
    stored = run.store.sizes()
    shards = run.load_shards(stored)
    teacher = run.load_teacher(stored)
    manifest = run.check_manifest(manifest, [*shards, *([teacher] if teacher else [])])
    if manifest and index:
        run.compare("samples", "index.json", index.digest, manifest.fingerprint.samples)
        run.compare("samples", "index.json", f"{len(index.shards)} shards", f"{manifest.num_shards} shards")
    committed = committed_shards(stored)
    num_planned = manifest.num_shards if manifest else len(committed)
    run.check_places(stored, num_planned)
    if teacher:
        run.check_teacher(teacher, stored)
    chosen = _drawn([record.shard for record in shards], percent, seed)
    tars = _drawn([entry.name for entry in index.shards] if index else [], percent, seed)
    run.num_to_do = len(chosen) + len(tars)
    for record in shards:
        run.check_shard(manifest, record, index, stored, read=record.shard in chosen)
    if index and samples:
        run.check_tars(samples, index, tars)
    return VerifyReport(
        targets_url=run.store.url,
        samples_url=None if samples is None else samples.url,
        num_planned=num_planned,
        num_committed=len(committed),
        num_read=len(chosen),
        num_files=run.num_files,
        num_bytes=run.num_bytes,
        num_samples=run.num_samples,
        missing=tuple(sorted(set(range(num_planned)) - set(committed))),
        findings=tuple(dict.fromkeys(run.findings)),
    )


def _written_index(samples: Store) -> SampleIndex:
    """The index, which must be byte for byte as it was written: its digest leaves out sizes and member tables."""
    index = SampleIndex.load(samples)
    if index.to_bytes() != samples.read("index.json"):
        raise CorruptData(f"{samples.url}/index.json is not as it was written; restore it or pack the samples again")
    return index


def _read_all(tar: SampleShard) -> None:
    for row in range(len(tar)):
        tar.read(row)


def _drawn(items: Sequence[_Item], percent: float, seed: int) -> set[_Item]:
    count = math.ceil(len(items) * percent / 100)
    return set(random.Random(seed).sample(items, count))  # noqa: S311 - which shards, not a secret


def _size_of(stored: Mapping[str, int], path: str) -> str:
    return f"{stored[path]} bytes" if path in stored else "no such file"


class _ReportedCounts(BaseModel):
    shards: int


class _Run:
    """Counts and findings of one verification."""

    def __init__(self, store: Store, progress: Progress | None) -> None:
        self.store, self._progress = store, progress
        self.findings: list[Finding] = []
        self.num_files = self.num_bytes = self.num_samples = self.num_to_do = self._num_done = 0

    def guarded(self, shard: str, file: str, action: Callable[[], _Result], *, refuse: bool = False) -> _Result | None:
        """The action's result; None and a finding if it meets damage, or a user's error that is not to be refused."""
        try:
            return action()
        except StoreUnavailable:
            raise
        except UserError as error:
            if refuse and not isinstance(error, CorruptData):
                raise
            found = str(error)
        except OSError as error:
            if error.errno not in (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO):
                raise
            found = str(error)
        self.findings.append(Finding(shard, file, found, "what was committed"))
        return None

    def compare(self, shard: str, file: str, found: object, expected: object) -> bool:
        """A finding unless both are equal."""
        if found != expected:
            self.findings.append(Finding(shard, file, str(found), str(expected)))
        return found == expected

    def advance(self) -> None:
        """Tell the caller."""
        self._num_done += 1
        if self._progress:
            self._progress(self._num_done, self.num_to_do, self.num_bytes)

    def load_shards(self, stored: Mapping[str, int]) -> list[CommitRecord]:
        """The sound records of shards, in order."""
        found = [self._load(CommitRecord, str(number), path) for number, path in committed_shards(stored).items()]
        return [record for record in found if record]

    def load_teacher(self, stored: Mapping[str, int]) -> TeacherRecord | None:
        """The record of `teacher/`, which an extraction writes before the first shard."""
        if not (_REPORT in stored or any(path.startswith(f"{TEACHER}/") or path == TEACHER_RECORD for path in stored)):
            return None
        return self._load(TeacherRecord, TEACHER, TEACHER_RECORD)

    def _load(self, kind: type[_Record], label: str, path: str) -> _Record | None:
        return self.guarded(label, path, lambda: kind.load(self.store, path))

    def check_manifest(self, manifest: Manifest | None, records: Sequence[Committed]) -> Manifest | None:
        """The manifest if it is the one of the records; if they agree on another one, it is it that was changed."""
        named = {record.manifest for record in records}
        if manifest is None or named <= {manifest.digest}:
            return manifest
        if len(named) == 1:
            self.compare("-", MANIFEST_PATH, f"digest {manifest.digest}", f"digest {named.pop()}, as all records name")
            return None
        for record in records:
            label = str(record.shard) if isinstance(record, CommitRecord) else TEACHER
            self.compare(label, record.record_path, record.manifest, manifest.digest)
        return manifest

    def check_places(self, stored: Mapping[str, int], num_planned: int) -> None:
        """Records that are missing though their shard was made, and files where only ours may be."""
        shards = committed_shards(stored)
        for number in shards:
            if number >= num_planned:
                self.findings.append(
                    Finding("-", commit_path(number), f"shard {number}", f"no shard above {num_planned - 1}")
                )
        lost = {}
        for path in stored:
            folder = _SHARD_FOLDER.match(path)
            if folder and int(folder[2]) not in shards:
                lost[int(folder[2])] = f"no such file, but {folder[1]}/"
            elif not folder and path.startswith((f"{SHARDS}/", f"{COMMITS}/")):
                ours = path in shards.values() or path == TEACHER_RECORD
                if not ours:
                    self.findings.append(Finding("-", path, "a file", "no such file"))
        lost |= {
            number: f"no such file, but {_REPORT} counts {self._num_reported()} shards"
            for number in range(num_planned if self._num_reported() > len(shards) else 0)
            if number not in shards and number not in lost
        }
        for number, found in sorted(lost.items()):
            self.findings.append(
                Finding(str(number), commit_path(number), found, "a record: it was removed, or extraction was stopped")
            )

    def _num_reported(self) -> int:
        """Shards that the last extraction left; 0 when it left no report."""
        try:
            return _ReportedCounts.model_validate_json(self.store.read(_REPORT)).shards
        except (FileNotFoundError, ValidationError):
            return 0

    def check_shard(
        self,
        manifest: Manifest | None,
        record: CommitRecord,
        index: SampleIndex | None,
        stored: Mapping[str, int],
        *,
        read: bool,
    ) -> None:
        """Sizes of one shard's files; if it is to be read, their digests and all that they decode to."""
        label, faults = str(record.shard), len(self.findings)
        self.check_sizes(label, record, stored)
        if not read:
            return

        def read_all() -> None:
            with self.store.as_stored(record.path) as here:
                self.check_digests(label, record, here)
                if manifest and manifest.digest == record.manifest and len(self.findings) == faults:
                    # Only then is there something to decode that the digests have not condemned.
                    self._decode(here, manifest, record, index)

        self.guarded(label, record.path, read_all)
        self.advance()

    def check_teacher(self, record: TeacherRecord, stored: Mapping[str, int]) -> None:
        """Sizes and digests of the teacher's files."""
        self.check_sizes(TEACHER, record, stored)

        def read_all() -> None:
            with self.store.as_stored(record.path) as here:
                self.check_digests(TEACHER, record, here)

        self.guarded(TEACHER, record.path, read_all)

    def check_sizes(self, label: str, record: Committed, stored: Mapping[str, int]) -> None:
        """Presence and size of a folder's files, and that there are no others."""
        below = f"{record.path}/"
        found = {path.removeprefix(below): size for path, size in stored.items() if path.startswith(below)}
        expected = {name: num_bytes for name, (num_bytes, _) in record.files.items()}
        for name in sorted(found.keys() | expected.keys()):
            self.compare(label, name, _size_of(found, name), _size_of(expected, name))

    def check_digests(self, label: str, record: Committed, here: Store) -> None:
        """Sha256 of a folder's files; of other sizes `check_sizes` tells."""
        found = measure_files(here.local(record.path))
        self.num_files += len(found)
        self.num_bytes += sum(num_bytes for num_bytes, _ in found.values())
        for name in sorted(found.keys() & record.files.keys()):
            (num_bytes, sha256), (expected_bytes, expected) = found[name], record.files[name]
            if num_bytes == expected_bytes:
                self.compare(label, name, f"sha256 {sha256}", f"sha256 {expected}")

    def check_tars(self, samples: Store, index: SampleIndex, chosen: Container[str]) -> None:
        """Sizes of all sample shards, and all that the chosen ones hold."""
        stored = samples.sizes()
        for entry in index.shards:
            right = self.compare(entry.name, entry.name, _size_of(stored, entry.name), f"{entry.bytes} bytes")
            table = entry.table_name
            if not self.compare(entry.name, table, _size_of(stored, table), f"{entry.table_bytes} bytes"):
                self.doubt_index(table)
                right = False
            if entry.name in chosen:
                if right:
                    self.check_tar(samples, entry)
                self.advance()

    def doubt_index(self, table: str) -> None:
        """Where a table is not what the index says of it, either may be damaged: no other digest holds these words."""
        self.compare(
            "samples", "index.json", f"another size or sha256 of {table}", f"those of {table}, or that is damaged"
        )

    def check_tar(self, samples: Store, entry: SampleShardEntry) -> None:
        """Sizes and digests of one sample shard and its table, and every sample where the table says."""
        members = self.guarded(entry.name, entry.table_name, lambda: entry.read_members(samples))
        if members is None:
            self.doubt_index(entry.table_name)

        def check() -> None:
            with (
                samples.as_stored(entry.name) as here,
                SampleShard(here.local(entry.name), entry, members or ()) as tar,
            ):
                tar.verify()
                # The tar is right: what cannot be read now is where the table misleads.
                if members is not None:
                    self.guarded(entry.name, entry.table_name, lambda: _read_all(tar))

        self.num_files += 2
        self.num_bytes += entry.bytes + entry.table_bytes
        self.guarded(entry.name, entry.name, check)

    def _decode(self, here: Store, manifest: Manifest, record: CommitRecord, index: SampleIndex | None) -> None:
        """Every row and every map, one at a time."""
        targets = TargetShard(here, manifest, record)
        tar = index.shards[record.shard] if index and record.shard < len(index.shards) else None
        # A table that cannot be read is the samples' fault, not this shard's.
        if index and (tar is None or self.guarded(tar.name, tar.table_name, lambda: tar.members) is not None):
            joined_rows(index, targets)
        shard, codec = str(record.shard), manifest.fingerprint.map_codec
        decoder = MapCodec.of_layers(codec, manifest.fingerprint.layers, manifest.fingerprint.windows)
        references = 0
        for row in range(len(targets)):
            sample, _ = targets.read(row, with_maps=False)
            num_answers = int(sample.answer_mask.sum())
            self.compare(
                shard,
                "logit_offsets",
                f"{len(sample.logits_RQ)} rows of {sample.key}",
                f"{num_answers} rows of {sample.key}",
            )
            faults = AnswerLogitsCodec(manifest.fingerprint.logit_codec).decode(sample.logits_RQ).fault()
            self.compare(shard, "logit_records", faults or "sound records", "sound records")
            references += sample.map_row is not None
        self.compare(shard, "map_rows", references, record.num_map_references)
        for map_row, num_tokens in enumerate(targets.map_num_tokens):
            entry = targets.read_map(map_row)
            self.compare(shard, "map_code_offsets", entry.codes_LC.shape[1], codec.num_codes(num_tokens))
            if entry.windows is not None:
                try:
                    decoder.decode_flips(entry)
                except ValueError as error:
                    self.findings.append(Finding(shard, "window_flips", str(error), "positions inside the masks"))
        self.num_samples += len(targets)
