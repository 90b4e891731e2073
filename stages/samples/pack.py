"""Packs records and their images into sample shards; conversations about one image lie side by side."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import Field

from stages.samples.first_look import check_layout
from stages.samples.image_files import ImageFolder
from stages.samples.ledger import Ledger
from stages.samples.llava_record import LlavaRecord, parse_record, record_id
from stages.samples.record_counts import RecordCounter, RecordCounts
from stages.samples.sources.data_file import Source, open_source
from stages.samples.staged_folder import LEDGER, REPORT, SHARDS, StagedFolder
from stages.unusable_sample import UnusableSample
from storage.errors import UserError, disk_errors_named
from storage.progress import SILENT, Progress
from storage.samples.members import StoredSample
from storage.samples.shard_writer import SampleShardWriter
from storage.strict_model import StrictModel

_RECORDS_BETWEEN_REPORTS = 1000


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
    seconds: float


_Row = tuple[int, tuple[int, ...]]
"""A record: its ordinal, and its position in the source."""


def pack_samples(
    source: Path, images: Path | None, out: Path, config: PackConfig | None = None, progress: Progress = SILENT
) -> PackReport:
    """Pack the data file or folder `source`, whose image paths are relative to `images`, into shards in `out`.

    Reads `source` twice, once to validate and group and once to pack. Holds a record, one group's images and a few
    hundred bytes a record in memory. The same records and images give the same shards and index byte for byte,
    whatever file they come in; packing again into a finished folder changes nothing.

    Raises:
        TooManySkipped: If more samples are unusable than allowed; `out` then holds the ledger and nothing else.
        UserError: If the input cannot be read at all, or `out` holds something else.
    """
    started = time.monotonic()
    config = config or PackConfig()
    folder = ImageFolder(images, config.max_image_pixels, config.max_shard_bytes)
    check_layout(source)
    with disk_errors_named(out), StagedFolder(out) as staged, open_source(source, staged.path) as records:
        ledger, counter = Ledger(), RecordCounter()
        groups = _group_records(records, images, ledger, counter, progress)
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
            seconds=round(time.monotonic() - started, 3),
        )
        (staged.path / REPORT).write_text(report.to_json() + "\n", encoding="utf-8")
        staged.publish()
    return report


def _group_records(
    records: Source, root: Path | None, ledger: Ledger, counter: RecordCounter, progress: Progress
) -> list[list[_Row]]:
    """Records about the same images, in the order their first appears; a text-only record is a group of its own."""
    groups: dict[tuple[str, ...] | int, list[_Row]] = {}
    task = progress.task("read records", unit="records")
    for ordinal, (position, value) in enumerate(records.scan()):
        try:
            record = parse_record(value, ordinal, root)
        except UnusableSample as why:
            ledger.skip(ordinal, record_id(value, ordinal), why)
        else:
            counter.add(record)
            groups.setdefault(record.image_names or ordinal, []).append((ordinal, position))
        if (ordinal + 1) % _RECORDS_BETWEEN_REPORTS == 0:
            task.update(done=ordinal + 1)
    task.remove()
    return list(groups.values())


class _Packer:
    """The second pass: reads each group's images and records and hands them to the shard writer."""

    def __init__(
        self, records: Source, root: Path | None, folder: ImageFolder, ledger: Ledger, config: PackConfig
    ) -> None:
        self._records, self._root, self._folder, self._ledger, self._config = records, root, folder, ledger, config
        self.images: set[str] = set()
        self.num_samples = self.num_text_only = 0

    def pack(self, groups: Sequence[list[_Row]], staged: StagedFolder, progress: Progress) -> None:
        """Write the shards of `groups` into the staging folder, or raise TooManySkipped."""
        total = sum(map(len, groups))
        num_records = total + len(self._ledger)
        num_bytes = 0
        task = progress.task("pack", total)
        with SampleShardWriter(staged.path, self._config.max_samples_per_shard, self._config.max_shard_bytes) as writer:
            for rows in groups:
                first = self._reload(*rows[0])
                names, images = first.image_names, self._read_images(first, rows)
                # Past the limit nothing more is written; the rest is still read, for the ledger.
                if images is not None and not self._over_limit(num_records):
                    self.images.update(names)
                    self.num_samples += len(rows)
                    self.num_text_only += 0 if names else len(rows)
                    for samples in self._samples(rows, images):
                        writer.add_group(samples)
                    num_bytes += sum(map(len, images))
                task.update(note=f"{num_bytes / 1e6:,.1f} MB")
                task.advance(len(rows))
            if self._over_limit(num_records) or not self.num_samples:
                self._ledger.write(staged.ledger_of_refusal)
                raise self._ledger.refusal(num_records, self._config.max_skipped_fraction, staged.ledger_of_refusal)

    def _over_limit(self, num_records: int) -> bool:
        return self._ledger.exceeds(num_records, self._config.max_skipped_fraction)

    def _read_images(self, first: LlavaRecord, rows: list[_Row]) -> tuple[bytes, ...] | None:
        """The images of a group, of which `first` is the first record; None if one cannot be used."""
        try:
            return tuple(self._folder.read(image.name, image.data) for image in first.images)
        except UnusableSample as why:
            for ordinal, position in rows:
                self._ledger.skip(ordinal, self._reload(ordinal, position).id, why)
            return None

    def _samples(self, rows: list[_Row], images: tuple[bytes, ...]) -> Iterator[list[StoredSample]]:
        """A group's samples, at most as many at a time as fit into one shard."""
        step = self._config.max_samples_per_shard
        for start in range(0, len(rows), step):
            yield [
                StoredSample(f"{ordinal:09d}", self._reload(ordinal, position).as_json(), images)
                for ordinal, position in rows[start : start + step]
            ]

    def _reload(self, ordinal: int, position: tuple[int, ...]) -> LlavaRecord:
        try:
            return parse_record(self._records.load(position), ordinal, self._root)
        except UnusableSample as why:
            raise UserError(
                f"record {ordinal} was fine when first read and now is not ({why}): "
                "the data file changed while it was packed; run again"
            ) from why
