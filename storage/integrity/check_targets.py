"""Checks of a target store: its records, what lies beside them, and all that its shards decode to."""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property, partial

import torch
from pydantic import BaseModel, ValidationError

from storage.codecs import answer_attention
from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.codecs.attention_maps import MapCodec
from storage.digests import parse_json
from storage.integrity.checks import Checks
from storage.samples.sample_set import SampleSet
from storage.stores import Store
from storage.streaming.join import joined_rows
from storage.targets.commits import COMMITS, SHARDS, CommitRecord, Committed, commit_path, committed_shards
from storage.targets.manifest import MANIFEST_PATH, Fingerprint, Manifest
from storage.targets.sample_targets import SampleTargets
from storage.targets.shard_reader import TargetShard
from storage.targets.teacher_assets import TEACHER, TEACHER_RECORD, TeacherRecord

ROWS_AT_ONCE = 4096
"""Answer rows that are decoded together: some 10 MB."""

_SHARD_FOLDER = re.compile(rf"({SHARDS}/([0-9]{{6,}})-[0-9a-f]{{16}}\.zarr)/")
_REPORT = "reports/extraction.json"


class _ReportedCounts(BaseModel):
    shards: int


class TargetChecks(Checks):
    """Checks one target store."""

    @cached_property
    def stored(self) -> dict[str, int]:
        """Bytes of each of its files."""
        return self.store.sizes()

    @cached_property
    def committed(self) -> Mapping[int, str]:
        """The paths of its shards' records."""
        return committed_shards(self.stored)

    def load_shards(self) -> list[CommitRecord]:
        """The sound records of shards, in order."""
        paths = self.committed.items()
        found = [self.guarded(n, path, partial(CommitRecord.load, self.store, path)) for n, path in paths]
        return [record for record in found if record]

    def load_teacher(self) -> TeacherRecord | None:
        """The record of `teacher/`, which an extraction writes before the first shard."""
        if any(path in (_REPORT, TEACHER_RECORD) or path.startswith(f"{TEACHER}/") for path in self.stored):
            return self.guarded(TEACHER, TEACHER_RECORD, lambda: TeacherRecord.load(self.store, TEACHER_RECORD))
        return None

    def check_manifest(self, manifest: Manifest | None, records: Sequence[Committed]) -> Manifest | None:
        """The manifest if it is the one of the records; if they agree on another one, it is it that was changed."""
        for record in records:
            version = record.format_version if manifest is None else manifest.format_version
            label = record.shard if isinstance(record, CommitRecord) else TEACHER
            found, expected = (f"format version {number}" for number in (record.format_version, version))
            self.compare(label, record.record_path, found, expected)
        named = {record.manifest for record in records}
        if manifest is None or named <= {manifest.digest}:
            return manifest
        if len(named) == 1:
            self.compare("-", MANIFEST_PATH, f"digest {manifest.digest}", f"digest {named.pop()}, as all records name")
            return None
        for record in records:
            label = record.shard if isinstance(record, CommitRecord) else TEACHER
            self.compare(label, record.record_path, record.manifest, manifest.digest)
        return manifest

    def check_settings(self, manifest: Manifest) -> None:
        """Sizes of the teacher that its config, which the fingerprint holds, has as well."""
        config = manifest.fingerprint.teacher_config
        text_config = config.get("text_config", config)
        for name, size in manifest.sizes.items() if isinstance(text_config, dict) else ():
            self.compare("-", MANIFEST_PATH, f"{name} {size}", f"{name} {text_config.get(name, size)}")

    def check_places(self, num_planned: int) -> None:
        """Records that are missing though their shard was made, and files where only ours may be."""
        shards = self.committed
        for number in shards:
            if number >= num_planned:
                self.fault("-", commit_path(number), f"shard {number}", f"no shard above {num_planned - 1}")
        lost = {}
        if (reported := self._num_reported()) > len(shards):
            lost = dict.fromkeys(range(num_planned), f"no such file, but {_REPORT} counts {reported} shards")
        ours = {*shards.values(), TEACHER_RECORD}
        for path in self.stored:
            if folder := _SHARD_FOLDER.match(path):
                lost[int(folder[2])] = f"no such file, but {folder[1]}/"
            elif path.startswith((f"{SHARDS}/", f"{COMMITS}/")) and path not in ours:
                self.fault("-", path, "a file", "no such file")
        for number in sorted(lost.keys() - shards.keys()):
            expected = "a record: it was removed, or extraction was stopped"
            self.fault(number, commit_path(number), lost[number], expected)

    def _num_reported(self) -> int:
        """Shards that the last extraction left; 0 when it left no report, or one that cannot be read."""
        if _REPORT not in self.stored:
            return 0
        data = self.guarded("-", _REPORT, lambda: self.store.read(_REPORT))
        try:
            return 0 if data is None else _ReportedCounts.model_validate_json(data).shards
        except ValidationError:
            return 0

    def check_shard(
        self, manifest: Manifest | None, record: CommitRecord, samples: SampleSet | None, *, read: bool
    ) -> None:
        """Sizes of one shard's files; if it is to be read, their digests and all that they decode to."""
        label, faults = record.shard, len(self.findings)
        self.check_sizes(label, record, self.stored)
        if not read:
            return

        def check(here: Store) -> None:
            self.check_digests(label, record, here)
            if manifest and manifest.digest == record.manifest and len(self.findings) == faults:
                # Only then is there something to decode that the digests have not condemned.
                targets = TargetShard(here, manifest, record)
                if samples:
                    self._check_keys(samples, targets)
                self._check_group(here, record)
                self._decode(manifest, targets)

        self.guarded_read(self.store, label, record.path, check)
        self.task.advance()

    def check_teacher(self, record: TeacherRecord) -> None:
        """Sizes and digests of the teacher's files."""
        self.check_sizes(TEACHER, record, self.stored)
        self.guarded_read(self.store, TEACHER, record.path, lambda here: self.check_digests(TEACHER, record, here))

    def _check_keys(self, samples: SampleSet, targets: TargetShard) -> None:
        """A table that cannot be read is the samples' fault, not this shard's."""
        shard, shards = targets.record.shard, samples.index.shards
        if shard < len(shards):
            tar = shards[shard]
            if self.guarded(tar.name, tar.table_name, lambda: samples.members(shard)) is None:
                return
        joined_rows(samples, targets)

    def _check_group(self, here: Store, record: CommitRecord) -> None:
        """The group of a shard, which repeats counts for people."""
        found = parse_json(here.read(f"{record.path}/zarr.json", record.files["zarr.json"].bytes), "zarr.json")
        attributes = {"compodistill": record.repeated_counts}
        self.compare(
            record.shard, "zarr.json", found, {"attributes": attributes, "zarr_format": 3, "node_type": "group"}
        )

    def _decode(self, manifest: Manifest, targets: TargetShard) -> None:
        """Every row and every map, one at a time."""
        shard, fingerprint = targets.record.shard, manifest.fingerprint
        decoder = MapCodec.of_layers(fingerprint.map_codec, fingerprint.layers, fingerprint.windows)
        logits = AnswerLogitsCodec(fingerprint.logit_codec)
        num_held, records = 0, []
        for row in range(len(targets)):
            sample, _ = targets.read(row, with_maps=False, with_answers=fingerprint.answer_attention)
            num_answers = int(sample.answer_mask.sum())
            found, expected = (f"{count} rows of {sample.key}" for count in (len(sample.logits_RQ), num_answers))
            self.compare(shard, "logit_offsets", found, expected)
            if sample.num_cut_answer_tokens and not _ends_as_cut(sample, fingerprint):
                found = f"{sample.key} of {len(sample.token_ids)} tokens, said to be cut"
                self.fault(shard, "cut_answer_tokens", found, f"an end as {fingerprint.cut} leaves it")
            if (held_LaN := sample.answer_attention_LaN) is not None and (bad := answer_attention.fault(held_LaN)):
                self.fault(shard, "answer_attention", f"{bad} in {sample.key}", "sound values")
            records.append(sample.logits_RQ)
            # Of many samples at once: decoding a few rows takes as long as decoding thousands.
            num_held += len(sample.logits_RQ)
            if num_held >= ROWS_AT_ONCE or row == len(targets) - 1:
                faults = logits.fault(torch.cat(records))
                self.compare(shard, "logit_records", faults or "sound records", "sound records")
                num_held, records = 0, []
        for map_row, num_tokens in enumerate(targets.map_num_tokens):
            try:
                decoder.check(targets.read_map(map_row))
            except ValueError as error:
                self.fault(shard, "map_codes", f"map {map_row} of {num_tokens} tokens: {error}", "as the manifest says")
        self.num_samples += len(targets)


def _ends_as_cut(sample: SampleTargets, made_from: Fingerprint) -> bool:
    """Whether a sample ends where one that lost answer tokens does: with an answer, or at the limit."""
    at_limit = made_from.cut == "tokens" and len(sample.token_ids) == made_from.max_length
    return at_limit or bool(sample.answer_mask[-1:].any())
