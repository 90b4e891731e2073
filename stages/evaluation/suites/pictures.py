"""Pictures of suites: where their bytes are, and what the suite's makers do to them before they are shown."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol
from zipfile import ZipFile

from PIL import Image, ImageDraw

from stages.images import decode_image
from storage.regular_files import is_regular, read_regular
from storage.samples.image_settings import ExifTurn
from storage.samples.members import MAX_MEMBER_BYTES


class PictureSource(Protocol):
    """Where a picture's bytes are; equal for the same picture. Its text names it for people."""

    def exists(self) -> bool:
        """Whether they can be read."""

    def read(self) -> bytes:
        """The bytes of the image file."""


@dataclass(frozen=True)
class PictureFile:
    """A file of its own."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def exists(self) -> bool:
        return is_regular(self.path)

    def read(self) -> bytes:
        return read_regular(self.path, MAX_MEMBER_BYTES)


@dataclass(frozen=True)
class PictureInZip:
    """A member of a zip archive, which is not unpacked."""

    archive: Path
    member: str

    def __str__(self) -> str:
        return f"{self.archive}: {self.member}"

    def exists(self) -> bool:
        with ZipFile(self.archive) as archive:
            return self.member in archive.NameToInfo

    def read(self) -> bytes:
        with ZipFile(self.archive) as archive, archive.open(self.member) as file:
            return file.read(MAX_MEMBER_BYTES + 1)[:MAX_MEMBER_BYTES]


@dataclass(frozen=True)
class PictureInTable:
    """A cell of a data set's row, whose bytes are in memory."""

    name: str
    data: bytes

    def __str__(self) -> str:
        return self.name

    def exists(self) -> bool:
        return bool(self.data)

    def read(self) -> bytes:
        return self.data


@dataclass(frozen=True)
class Mark:
    """Something drawn over a picture, in fractions of its width and height: left, top, right, bottom."""

    box: tuple[float, float, float, float]
    color: Literal["red", "green"]


@dataclass(frozen=True)
class SuitePicture:
    """A picture as a question shows it."""

    source: PictureSource
    crop: tuple[int, int, int, int] | None = None
    """Left, top, right, bottom in pixels: only this part is shown."""
    marks: tuple[Mark, ...] = ()

    def load(self, max_pixels: int, exif: ExifTurn, *, blank: bool = False) -> Image.Image:
        """The picture in RGB; `blank` is mid-grey of the same size.

        Raises:
            UserError: If it cannot be decoded.
            OSError: If it cannot be read.
        """
        image = decode_image(self.source.read(), max_pixels, exif)
        if self.crop is not None:
            image = image.crop(self.crop)
        if blank:
            return Image.new("RGB", image.size, (127, 127, 127))
        for mark in self.marks:
            left, top, right, bottom = mark.box
            edges = (left * image.width, top * image.height, right * image.width, bottom * image.height)
            ImageDraw.Draw(image).rectangle(edges, outline=mark.color, width=4)
        return image
