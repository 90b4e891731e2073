"""One sample as tar members: their names, their order and their USTAR headers."""

import json
import re
import tarfile
from dataclasses import dataclass
from typing import Any, Final, Literal

BLOCK_BYTES = 512
MAX_KEY_CHARS = 80
MAX_MEMBER_BYTES = 256 * 2**20
"""Largest image or conversation: each is in memory whole; an image of the largest allowed number of pixels has less."""
ImageSuffix = Literal["jpg", "png", "webp", "gif", "bmp", "tif"]
_OPENINGS: Final[tuple[tuple[bytes, ImageSuffix], ...]] = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
    (b"II+\0", "tif"),  # of more than 4 GiB
    (b"MM\0+", "tif"),
)
_KEY = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_KEY_CHARS}}}")


@dataclass(frozen=True)
class StoredSample:
    """A conversation with its images, as bytes."""

    key: str
    """Unique in the data set; letters, digits, `_` and `-`: WebDataset splits member names at the first dot."""
    record: dict[str, Any]
    """The LLaVA conversation: `id`, `conversations`, optionally `image`."""
    images: tuple[bytes, ...]
    """Encoded images in the order of the conversation's placeholders; none for text-only samples."""


@dataclass(frozen=True)
class Member:
    """One file of a tar."""

    name: str
    data: bytes

    @property
    def tar_bytes(self) -> int:
        """Bytes in the tar: the header and the data, padded to whole blocks."""
        return BLOCK_BYTES + len(self.data) + padding(len(self.data))


def image_suffix(data: bytes) -> ImageSuffix | None:
    """What the first bytes say that the file is, None for anything else; nothing is decoded."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    # Two letters alone could begin any text; after them come sizes, and that of the header is below 256.
    if data[:2] == b"BM" and data[15:18] == bytes(3):
        return "bmp"
    return next((suffix for opening, suffix in _OPENINGS if data.startswith(opening)), None)


def is_key(text: str) -> bool:
    """Whether `text` may name a sample."""
    return _KEY.fullmatch(text) is not None


def members_of(sample: StoredSample) -> list[Member]:
    """`KEY.json`, then `KEY.jpg` for one image or `KEY.0.jpg`, `KEY.1.png`, ... for several.

    Raises:
        ValueError: For a key that cannot be a member's name, and for images of no format that `image_suffix` knows.
    """
    if not is_key(sample.key):
        raise ValueError(f"key {sample.key!r} is no safe member name; use 1 to {MAX_KEY_CHARS} of A-Z a-z 0-9 _ -")
    record = json.dumps(sample.record, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    members = [Member(f"{sample.key}.json", record.encode())]
    if largest := [len(data) for data in (members[0].data, *sample.images) if len(data) > MAX_MEMBER_BYTES]:
        raise ValueError(f"sample {sample.key} has a part of {largest[0]} bytes, at most {MAX_MEMBER_BYTES} are stored")
    for number, image in enumerate(sample.images):
        suffix = image_suffix(image)
        if suffix is None:
            raise ValueError(f"image {number} of sample {sample.key} starts with {image[:8]!r}: of no known format")
        middle = f".{number}" if len(sample.images) > 1 else ""
        members.append(Member(f"{sample.key}{middle}.{suffix}", image))
    return members


def header(name: str, num_bytes: int) -> bytes:
    """The USTAR header of a member: equal names and sizes give equal bytes (no time, no owner)."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime, info.uid, info.gid = num_bytes, 0o644, 0, 0, 0
    return info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")


def padding(num_bytes: int) -> int:
    """Zero bytes after a member's data."""
    return -num_bytes % BLOCK_BYTES
