"""Pictures of suites: where their bytes are, and what the suite's makers do to them before they are shown."""

import hashlib
import io
import os
import tempfile
import weakref
import zlib
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, Literal, Protocol
from zipfile import BadZipFile, ZipFile

from PIL import Image, ImageDraw

from stages.images import decode_image
from storage.errors import UserError, disk_errors_named
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
        try:
            with ZipFile(self.archive) as archive, archive.open(self.member) as file:
                return file.read(MAX_MEMBER_BYTES)
        except (BadZipFile, EOFError, zlib.error, RuntimeError, NotImplementedError) as error:
            raise UserError(f"{self} cannot be unpacked ({error}); fetch the archive again") from error


class PictureSpool:
    """Pictures that stand in the rows of data sets, in a temporary file without a name, each once.

    They are asked for in another order than that of the rows, and a compressed table is read from its front only.
    Threads may read at the same time. The file goes with the last picture of it.
    """

    def __init__(self) -> None:
        self._file: FileIO | None = None
        self._pictures: dict[bytes, PictureInTable] = {}

    def add(self, data: bytes, name: str) -> "PictureInTable":
        """The picture with these bytes; an earlier one if it has the same.

        Raises:
            StoreUnavailable: If the temporary folder is full.
        """
        digest = hashlib.sha256(data).digest()
        if digest not in self._pictures:
            with disk_errors_named(Path(tempfile.gettempdir())):
                if self._file is None:
                    self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 closed with this object
                    weakref.finalize(self, self._file.close)
                start = self._file.seek(0, os.SEEK_END)
                rest = memoryview(data)
                while rest:
                    rest = rest[self._file.write(rest) :]
            self._pictures[digest] = PictureInTable(name, start, len(data), self)
        return self._pictures[digest]

    def read(self, start: int, num_bytes: int) -> bytes:
        """Bytes of the file."""
        assert self._file is not None
        return os.pread(self._file.fileno(), num_bytes, start)


@dataclass(frozen=True)
class PictureInTable:
    """A cell of a data set's row, named after the first row that has these bytes."""

    name: str
    start: int
    num_bytes: int
    spool: PictureSpool = field(compare=False, repr=False)

    def __str__(self) -> str:
        return self.name

    def exists(self) -> bool:
        return self.num_bytes > 0

    def read(self) -> bytes:
        return self.spool.read(self.start, self.num_bytes)


@dataclass(frozen=True)
class Mark:
    """Something drawn over a picture, in fractions of its width and height: left, top, right, bottom."""

    box: tuple[float, float, float, float]
    color: Literal["red", "green"]

    def draw(self, image: Image.Image, max_pixels: int) -> None:
        """Draws its edges into the image."""
        left, top, right, bottom = self.box
        edges = (left * image.width, top * image.height, right * image.width, bottom * image.height)
        ImageDraw.Draw(image).rectangle(edges, outline=self.color, width=4)


@dataclass(frozen=True)
class MaskMark:
    """Pixels of a picture that are tinted: those where a PNG beside it, of any size, has this value."""

    mask: PictureSource
    value: int
    rgba: tuple[int, int, int, int]

    def __repr__(self) -> str:
        return f"{self.rgba} where {str(self.mask).rsplit('/', 1)[-1]} is {self.value}"

    def draw(self, image: Image.Image, max_pixels: int) -> None:
        """Tints them in the image.

        Raises:
            UserError: If the mask is no PNG of one channel with at most `max_pixels`.
        """
        *rgb, alpha = self.rgba
        tinted = [alpha * (value == self.value) for value in range(256)]
        mask = _one_channel(self.mask, max_pixels).resize(image.size, Image.Resampling.NEAREST)
        image.paste(tuple(rgb), (0, 0), mask.point(tinted))


def _one_channel(source: PictureSource, max_pixels: int) -> Image.Image:
    """The numbers of a grey PNG, or the places in the palette of a coloured one, as grey."""
    try:
        with Image.open(io.BytesIO(source.read()), formats=("PNG",)) as mask:
            if mask.mode not in {"L", "P"} or mask.width * mask.height > max_pixels:
                found = f"{mask.width}x{mask.height} pixels of mode {mask.mode}"
                raise UserError(f"{source}: {found}; expected a mask of one channel, at most {max_pixels} pixels")
            return Image.frombytes("L", mask.size, mask.tobytes())
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{source} is no mask in PNG format ({error}); fetch it again") from error


@dataclass(frozen=True)
class SuitePicture:
    """A picture as a question shows it."""

    source: PictureSource
    crop: tuple[int, int, int, int] | None = None
    """Left, top, right, bottom in pixels: only this part is shown."""
    marks: tuple[Mark | MaskMark, ...] = ()

    @property
    def sources(self) -> tuple[PictureSource, ...]:
        """All that must be there to show it."""
        return self.source, *(mark.mask for mark in self.marks if isinstance(mark, MaskMark))

    def load(self, max_pixels: int, exif: ExifTurn, *, blank: bool = False) -> Image.Image:
        """The picture in RGB; `blank` is mid-grey of the same size.

        Raises:
            UserError: If it cannot be decoded.
            OSError: If it cannot be read.
        """
        image = decode_image(self.source.read(), max_pixels, exif)
        if self.crop is not None:
            image = _cropped(image, self.crop, max_pixels)
        if blank:
            return Image.new("RGB", image.size, (127, 127, 127))
        for mark in self.marks:
            mark.draw(image, max_pixels)
        return image


def _cropped(image: Image.Image, box: tuple[int, int, int, int], max_pixels: int) -> Image.Image:
    """The part within a box; black where the box leaves the picture, as in Pillow."""
    left, top, right, bottom = box
    if not (left < right and top < bottom and left < image.width and top < image.height and right > 0 and bottom > 0):
        raise UserError(f"the box {box} shows nothing of the picture, which has {image.width}x{image.height} pixels")
    if (right - left) * (bottom - top) > max_pixels:
        raise UserError(f"the box {box} has more than {max_pixels} pixels, the most that a picture may have")
    return image.crop(box)


def picture_of_cell(name: str, cell: Any) -> SuitePicture:
    """The picture that a row of a data set holds, as `SuiteFiles.rows` hands it out.

    Raises:
        UserError: If the cell holds none; `name` says which one.
    """
    if not isinstance(cell, SuitePicture):
        raise UserError(f"{name}: expected the bytes of an image file, found {cell!r:.100}")
    return cell
