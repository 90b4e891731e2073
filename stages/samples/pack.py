"""Packs records and their images into sample shards; conversations about one image lie side by side."""

import tempfile
import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pydantic import Field

from stages.samples.first_look import check_layout
from stages.samples.image_files import ImageFolder
from stages.samples.ledger import Ledger
from stages.samples.llava_record import LlavaRecord, parse_record, record_id
from stages.samples.record_counts import RecordCounter, RecordCounts
from stages.samples.record_groups import RecordGroup, RecordGroups
from stages.samples.sources.data_file import Source, open_source
from stages.samples.staged_folder import LEDGER, REPORT, SHARDS, StagedFolder
from stages.unusable_sample import UnusableSample
from storage.errors import UserError, disk_errors_named
from storage.progress import SILENT, Progress
from storage.samples.members import StoredSample
from storage.samples.shard_writer import SampleShardWriter
from storage.strict_model import StrictModel

_RECORDS_BETWEEN_REPORTS = 1000

_Row = tuple[int, dict[str, Any]]
"""A record: its ordinal and its stored form."""


class PackConfig(StrictModel):
    """How samples are packed."""

    max_samples_per_shard: int = Field(512, ge=1)
    """A shard is one unit of extraction work: smaller ones spread and resume better, larger stream better."""
    max_shard_bytes: int = Field(256 * 2**20, ge=1)
    """Bytes of a shard at which the next one begins; an image file larger than this is unusable."""
    max_skipped_fraction: float = Field(0.0, ge=0.0, le=1.0)
    """Share of records that may be unusable before packing fails; each is in the ledger anyway."""
    max_image_pixels: int = Field(50_000_000, ge=1)
    """Width times height above which an image is refused, before it is decoded."""


class PackReport(StrictModel):
    """What packing did; `pack-report.json` beside the shards."""

    num_samples: int
    num_images: int
    """Distinct image files of these samples."""
    num_turned: int
    """Those of them whose EXIF data ask for a turn, which `images.exif` of the extraction decides about."""
    num_text_only: int
    """Samples without an image."""
    num_skipped: dict[str, int]
    """Samples left out, by reason."""
    records: RecordCounts
    num_shards: int
    num_bytes: int
    """Of all tar files."""
    max_samples_per_shard: int
    max_shard_bytes: int
    """The limits that they were packed with."""
    seconds: float


def pack_samples(
    source: Path, images: Path | None, out: Path, config: PackConfig | None = None, progress: Progress = SILENT
) -> PackReport:
    """Pack the data file or folder `source`, whose image paths are relative to `images`, into shards in `out`.

    Reads `source` twice in its order, once to validate and group and once to pack. Holds a record, one group's images
    and a few hundred bytes a record in memory, and on disk the text of further records about the same images. The same
    records and images give the same shards and index byte for byte, whatever file they come in; packing again into a
    finished folder changes nothing.

    Raises:
        TooManySkipped: If more samples are unusable than allowed; `out` then holds the ledger and nothing else.
        UserError: If the input cannot be read at all, or `out` holds something else.
    """
    started = time.monotonic()
    config = config or PackConfig()
    folder = ImageFolder(images, config.max_image_pixels, config.max_shard_bytes)
    check_layout(source)
    with (
        disk_errors_named(out),
        StagedFolder(out) as staged,
        open_source(source) as records,
        tempfile.TemporaryFile(dir=staged.path) as texts,
    ):
        staged.refuse_other_limits(config.max_samples_per_shard, config.max_shard_bytes)
        ledger, counter = Ledger(), RecordCounter()
        groups = _group_records(records, images, RecordGroups(texts), ledger, counter, progress)
        packed = _Packer(records, images, folder, ledger, config)
        packed.pack(groups, staged, progress)
        ledger.write(staged.path / LEDGER)
        shards = list(staged.path.glob(SHARDS))
        report = PackReport(
            num_samples=packed.num_samples,
            num_images=len(packed.images),
            num_turned=len(packed.images & folder.turned),
            num_text_only=packed.num_text_only,
            num_skipped=ledger.num_by_reason(),
            records=counter.counts(),
            num_shards=len(shards),
            num_bytes=sum(shard.stat().st_size for shard in shards),
            max_samples_per_shard=config.max_samples_per_shard,
            max_shard_bytes=config.max_shard_bytes,
            seconds=round(time.monotonic() - started, 3),
        )
        (staged.path / REPORT).write_text(report.to_json() + "\n", encoding="utf-8")
        staged.publish()
    return report


def _group_records(
    records: Source, root: Path | None, groups: RecordGroups, ledger: Ledger, counter: RecordCounter, progress: Progress
) -> RecordGroups:
    """The first pass: what can be used goes into `groups`, the rest into the ledger."""
    task = progress.task("read records", unit="records")
    for ordinal, value in enumerate(records.scan()):
        try:
            record = parse_record(value, ordinal, root)
        except UnusableSample as why:
            ledger.skip(ordinal, record_id(value, ordinal), why)
        else:
            counter.add(record)
            groups.add(ordinal, record)
        if (ordinal + 1) % _RECORDS_BETWEEN_REPORTS == 0:
            task.update(done=ordinal + 1)
    task.remove()
    return groups


class _Packer:
    """The second pass: reads each group's images and records and hands them to the shard writer."""

    def __init__(
        self, records: Source, root: Path | None, folder: ImageFolder, ledger: Ledger, config: PackConfig
    ) -> None:
        self._records, self._root, self._folder, self._ledger, self._config = records, root, folder, ledger, config
        self.images: set[str] = set()
        self.num_samples = self.num_text_only = 0

    def pack(self, groups: RecordGroups, staged: StagedFolder, progress: Progress) -> None:
        """Write the shards of `groups` into the staging folder, or raise TooManySkipped."""
        num_records = groups.num_records + len(self._ledger)
        num_bytes = 0
        task = progress.task("pack", groups.num_records)
        with SampleShardWriter(staged.path, self._config.max_samples_per_shard, self._config.max_shard_bytes) as writer:
            for group, first in self._first_records(groups):
                rows = chain([(group.first, first.as_json())], groups.others(group))
                images = self._read_images(first, rows)
                # Past the limit nothing more is written; the rest is still read, for the ledger.
                if images is not None and not self._over_limit(num_records):
                    self.images.update(group.image_names)
                    self.num_samples += len(group)
                    self.num_text_only += 0 if group.image_names else len(group)
                    while samples := self._next_samples(rows, images):
                        writer.add_group(samples)
                    num_bytes += sum(map(len, images))
                task.update(note=f"{num_bytes / 1e6:,.1f} MB")
                task.advance(len(group))
            if self._over_limit(num_records) or not self.num_samples:
                self._ledger.write(staged.ledger_of_refusal)
                raise self._ledger.refusal(num_records, self._config.max_skipped_fraction, staged.ledger_of_refusal)

    def _first_records(self, groups: RecordGroups) -> Iterator[tuple[RecordGroup, LlavaRecord]]:
        """Each group with its first record, which is read once more for its images."""
        numbered = enumerate(self._records.scan())
        for group in groups:
            value = next((value for ordinal, value in numbered if ordinal == group.first), None)
            if value is None:
                raise _changed(group.first, "it is no more there")
            try:
                first = parse_record(value, group.first, self._root)
            except UnusableSample as why:
                raise _changed(group.first, str(why)) from why
            if first.image_names != group.image_names:
                raise _changed(group.first, "it has other images")
            yield group, first

    def _over_limit(self, num_records: int) -> bool:
        return self._ledger.exceeds(num_records, self._config.max_skipped_fraction)

    def _read_images(self, first: LlavaRecord, rows: Iterator[_Row]) -> tuple[bytes, ...] | None:
        """The images of a group, of which `first` is the first record; None if one cannot be used."""
        try:
            return tuple(self._folder.read(image.name, image.data) for image in first.images)
        except UnusableSample as why:
            for ordinal, record in rows:
                self._ledger.skip(ordinal, record["id"], why)
            return None

    def _next_samples(self, rows: Iterator[_Row], images: tuple[bytes, ...]) -> list[StoredSample]:
        """The group's next samples, at most as many as fit into one shard."""
        return [
            StoredSample(f"{ordinal:09d}", record, images)
            for ordinal, record in islice(rows, self._config.max_samples_per_shard)
        ]


def _changed(ordinal: int, how: str) -> UserError:
    return UserError(
        f"record {ordinal} was fine when first read and now is not ({how}): "
        "the data file changed while it was packed; run again"
    )
