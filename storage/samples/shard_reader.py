"""Reading samples of one tar in any order, by the offsets of its member table."""

import os
import re
import zlib
from pathlib import Path
from typing import Self, get_args

from storage.digests import file_sha256, parse_json
from storage.errors import CorruptData
from storage.regular_files import open_regular
from storage.samples.index import SampleShardEntry
from storage.samples.members import BLOCK_BYTES, ImageSuffix, StoredSample, header, is_key
from storage.samples.table import SampleMembers

RESTORE = "restore it or pack the samples again"
_SUFFIXES = "|".join(get_args(ImageSuffix))
_IMAGE_NAME = re.compile(rf"(?P<key>[^.]+)(\.(?P<number>[0-9]+))?\.({_SUFFIXES})")


class SampleShard:
    """An open tar: `read(row)` costs one `pread` a member, wherever it lies."""

    def __init__(
        self, path: Path, entry: SampleShardEntry, members: tuple[SampleMembers, ...], holder: object = None
    ) -> None:
        """Opens the tar at `path`; a downloaded one is not evicted as long as `holder` lives."""
        self._path, self._entry, self._members, self._holder = path, entry, members, holder
        self._file = open_regular(path)

    def __len__(self) -> int:
        return self._entry.num_samples

    def read(self, row: int) -> StoredSample:
        """The sample at position `row`.

        Raises:
            IndexError: If there is no such row.
            CorruptData: If the tar does not hold the sample's members where its table says.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {self._path}, which has {len(self)} samples")
        key, spans, crc32 = self._members[row]
        json_name, record = self._member(key, *spans[0])
        if json_name != f"{key}.json":
            raise self._corrupt(key, f"member {json_name!r} instead of {key}.json")
        images = []
        for number, span in enumerate(spans[1:]):
            name, data = self._member(key, *span)
            match = _IMAGE_NAME.fullmatch(name)
            wanted = str(number) if len(spans) > 2 else None
            if match is None or match["key"] != key or match["number"] != wanted:
                raise self._corrupt(key, f"member {name!r} instead of image {number}")
            images.append(data)
        if zlib.crc32(b"".join([record, *images])) != crc32:
            raise self._corrupt(key, "other bytes than were packed (crc32)")
        fields = parse_json(record, f"sample shard {self._path}, sample {key}: {json_name}")
        if not isinstance(fields, dict):
            raise self._corrupt(key, f"{json_name} holds no JSON object")
        return StoredSample(key, fields, tuple(images))

    def may_share_images(self, row: int) -> bool:
        """Whether a sample beside this one has images of the same sizes in bytes, as those about one image have.

        Known from the member table alone: nothing is read.
        """
        sizes = [num_bytes for _, num_bytes in self._members[row].spans[1:]]
        neighbours = (self._members[other] for other in (row - 1, row + 1) if 0 <= other < len(self))
        return bool(sizes) and any([num_bytes for _, num_bytes in one.spans[1:]] == sizes for one in neighbours)

    def verify(self) -> None:
        """Raises CorruptData unless the file has the index's size and sha256."""
        found_bytes, found = self._path.stat().st_size, file_sha256(self._path)
        if (found_bytes, found) != (self._entry.bytes, self._entry.sha256):
            raise CorruptData(
                f"sample shard {self._path} has {found_bytes} bytes and sha256 {found[:12]}, the index says "
                f"{self._entry.bytes} and {self._entry.sha256[:12]}; {RESTORE}"
            )

    def close(self) -> None:
        """Close the file; a downloaded one may be evicted then."""
        self._file.close()
        self._holder = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _member(self, key: str, offset: int, num_bytes: int) -> tuple[str, bytes]:
        """Name and data; the header before the data must be byte for byte the one our writer makes."""
        block = os.pread(self._file.fileno(), BLOCK_BYTES + num_bytes, offset - BLOCK_BYTES)
        found, data = block[:BLOCK_BYTES], block[BLOCK_BYTES:]
        # Without what our writer never writes, which makes it another name than in the header.
        name = found[:100].rstrip(b"\0").decode("ascii", errors="ignore")
        if not is_key(name.partition(".")[0]) or found != header(name, num_bytes) or len(data) != num_bytes:
            raise self._corrupt(key, f"no regular member of {num_bytes} bytes at offset {offset}")
        return name, data

    def _corrupt(self, key: str, found: str) -> CorruptData:
        return CorruptData(
            f"sample shard {self._path}, sample {key}: found {found}; "
            "the tar is damaged or not the one of this index: run `cdp verify`, restore it or pack again"
        )
