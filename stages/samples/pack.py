"""Packs LLaVA data into sample shards; conversations about one image lie side by side."""

import json
import time
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

from pydantic import Field

from stages.samples.image_files import ImageFolder
from stages.samples.ledger import Ledger
from stages.samples.llava_json import LlavaRecords, open_llava_records
from stages.samples.llava_record import LlavaRecord, parse_record, record_id
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
    num_shards: int
    num_bytes: int
    """Of all tar files."""
    seconds: float


_Group = tuple[tuple[str, ...], list[tuple[int, int]]]
"""Images, and the records about them: (ordinal, position in the source) of each."""


def pack_samples(
    source: Path, images: Path, out: Path, config: PackConfig | None = None, progress: Progress = SILENT
) -> PackReport:
    """Pack the LLaVA data file `source`, whose image paths are relative to `images`, into shards in `out`.

    Reads `source` twice, once to validate and group and once to pack, and holds one group's images at a
    time. The same input gives the same shards and index byte for byte; packing again into a finished folder
    changes nothing.

    Raises:
        TooManySkipped: If more samples are unusable than allowed; `out` then holds the ledger and nothing else.
        UserError: If the input cannot be read at all, or `out` holds something else.
    """
    started = time.monotonic()
    config = config or PackConfig()
    records = open_llava_records(source)
    folder = ImageFolder(images, config.max_image_pixels, config.max_shard_bytes)
    with disk_errors_named(out), StagedFolder(out) as staged:
        ledger = Ledger()
        groups = list(_group_records(records, ledger, progress))
        if not groups and not len(ledger):
            raise UserError(f"{source} holds no records; expected LLaVA records")
        packed = _Packer(records, folder, ledger, config)
        packed.pack(groups, staged, progress)
        ledger.write(staged.path / LEDGER)
        shards = list(staged.path.glob(SHARDS))
        report = PackReport(
            num_samples=packed.num_samples,
            num_images=len(packed.images),
            num_turned=len(packed.images & folder.turned),
            num_text_only=packed.num_text_only,
            num_skipped=ledger.num_by_reason(),
            num_shards=len(shards),
            num_bytes=sum(shard.stat().st_size for shard in shards),
            seconds=round(time.monotonic() - started, 3),
        )
        (staged.path / REPORT).write_text(report.to_json() + "\n", encoding="utf-8")
        staged.publish()
    return report


def _group_records(records: LlavaRecords, ledger: Ledger, progress: Progress) -> Iterator[_Group]:
    """Groups in the order their first record appears; a text-only record is a group of its own."""
    groups: dict[tuple[str, ...] | int, _Group] = {}
    ids = _Ids()
    task = progress.task("read records", unit="records")
    for ordinal, position in enumerate(records.positions()):
        value = None
        try:
            value = records.load(position)
            record = parse_record(value, ordinal)
            ids.enter(record, ordinal)
        except UnusableSample as why:
            ledger.skip(ordinal, record_id(value, ordinal), why)
        else:
            groups.setdefault(record.images or ordinal, (record.images, []))[1].append((ordinal, position))
        if (ordinal + 1) % _RECORDS_BETWEEN_REPORTS == 0:
            task.update(done=ordinal + 1)
    task.remove()
    yield from groups.values()


class _Ids:
    """Ids already taken.

    In LLaVA's own files the id names the image, so it comes again with the same image and another conversation: that
    is no duplicate. The same id with another image, without one, or with the same conversation is a duplicate.
    """

    def __init__(self) -> None:
        self._first: dict[str, tuple[int, tuple[str, ...]]] = {}
        self._records: set[bytes] = set()

    def enter(self, record: LlavaRecord, ordinal: int) -> None:
        if not record.has_own_id:
            return
        first_ordinal, first_images = self._first.setdefault(record.id, (ordinal, record.images))
        if first_ordinal != ordinal and (record.images != first_images or not record.images):
            raise UnusableSample("duplicate_id", f"record {first_ordinal} has this id already")
        digest = sha256(json.dumps(record.as_json()).encode()).digest()
        if digest in self._records:
            raise UnusableSample("duplicate_id", f"id, image and conversation are those of record {first_ordinal}")
        self._records.add(digest)


class _Packer:
    """The second pass: reads each group's images and records and hands them to the shard writer."""

    def __init__(self, records: LlavaRecords, folder: ImageFolder, ledger: Ledger, config: PackConfig) -> None:
        self._records, self._folder, self._ledger, self._config = records, folder, ledger, config
        self.images: set[str] = set()
        self.num_samples = self.num_text_only = 0

    def pack(self, groups: Sequence[_Group], staged: StagedFolder, progress: Progress) -> None:
        """Write the shards of `groups` into the staging folder, or raise TooManySkipped."""
        total = sum(len(rows) for _, rows in groups)
        num_records = total + len(self._ledger)
        num_bytes = 0
        task = progress.task("pack", total)
        with SampleShardWriter(staged.path, self._config.max_samples_per_shard, self._config.max_shard_bytes) as writer:
            for names, rows in groups:
                images = self._read_images(names, rows)
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

    def _read_images(self, names: tuple[str, ...], rows: list[tuple[int, int]]) -> tuple[bytes, ...] | None:
        try:
            return tuple(map(self._folder.read, names))
        except UnusableSample as why:
            for ordinal, position in rows:
                self._ledger.skip(ordinal, self._reload(ordinal, position).id, why)
            return None

    def _samples(self, rows: list[tuple[int, int]], images: tuple[bytes, ...]) -> Iterator[list[StoredSample]]:
        """A group's samples, at most as many at a time as fit into one shard."""
        step = self._config.max_samples_per_shard
        for start in range(0, len(rows), step):
            yield [
                StoredSample(f"{ordinal:09d}", self._reload(ordinal, position).as_json(), images)
                for ordinal, position in rows[start : start + step]
            ]

    def _reload(self, ordinal: int, position: int) -> LlavaRecord:
        try:
            return parse_record(self._records.load(position), ordinal)
        except UnusableSample as why:
            raise UserError(
                f"record {ordinal} was fine when first read and now is not ({why}): "
                "the data file changed while it was packed; run again"
            ) from why
