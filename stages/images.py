"""Decodes the bytes of an image: bounded in size, of a few known formats, or refused with a named reason."""

import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from stages.unusable_sample import UnusableSample
from storage.samples.image_settings import ExifTurn
from storage.samples.members import ImageSuffix, image_suffix

FORMATS: Final[dict[ImageSuffix, str]] = {
    "jpg": "JPEG",
    "png": "PNG",
    "webp": "WEBP",
    "gif": "GIF",
    "bmp": "BMP",
    "tif": "TIFF",
}
"""Pillow's decoders by the ending that a file's first bytes ask for; the file's own name says nothing."""
FORMAT_NAMES: Final = "JPEG, PNG, WebP, GIF, BMP or TIFF"
MAX_PIXELS: Final = 50_000_000
MAX_SIDE: Final = 2**16
"""A row costs Pillow more than its pixels do: 50 million rows of one pixel take a gigabyte."""
MAX_SCANS: Final = 500
"""Scans of a progressive JPEG; each goes over the whole image, and encoders write about ten."""
MAX_TIFF_NUMBERS: Final = 2**18
"""Numbers of one tag of a TIFF, such as the offsets of its strips: Pillow makes objects of each."""
MAX_TIFF_TAGS: Final = 2**12
MAX_EXIF_BYTES: Final = 2**16
"""Read for the orientation, which stands near their beginning; one segment of a JPEG holds no more. Pillow makes
objects of all numbers of a tag."""
WHITES: Final = (1, 255, 65535)
"""Of grey in 32 bits, for which there is no agreed one."""
OVERSHOOT: Final = 1.1
"""Resampling and sharpening leave values above white."""
MAX_LAYERS: Final = 8
"""Times that the strips of a TIFF cover it: once, or once for each colour."""

_DECODER_ERRORS: Final = (
    *(OSError, SyntaxError, ValueError, LookupError, TypeError, EOFError, OverflowError, struct.error, zlib.error),
    *(AttributeError, ZeroDivisionError),  # Pillow's reader of TIFF raises these for tags that make no sense
    UserWarning,  # of damaged metadata, where warnings are errors
)
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_AS_TEXT: Final = "Raw profile type exif"
"""Key of EXIF data in hexadecimal digits, as older programs write them into a PNG."""
_BARE_MARKERS: Final = frozenset((0x00, 0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)))
"""Second bytes of a JPEG's markers without a length."""
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
"""Tags of a TIFF."""
_OTHER_FILES: Final = (
    (b"version https://git-lfs", "a Git LFS pointer in place of the image (fetch the images with `git lfs pull`)"),
    (b"<!doctype html", "an HTML page, as failed downloads leave it"),
    (b"<html", "an HTML page, as failed downloads leave it"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "an XML document"),
    (b"%pdf", "a PDF document"),
    (b"pk\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip file"),
)

# What makes an image unusable is in a ledger; a tag of its metadata that makes no sense concerns nobody.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class Picture:
    """A decoded image."""

    image: Image.Image
    """In RGB, without metadata."""
    is_turned: bool
    """Whether its EXIF data ask for a turn, applied or not."""


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS, exif: ExifTurn = "ignore") -> Image.Image:
    """The image of `read_picture`."""
    return read_picture(data, max_pixels, exif).image


def read_picture(data: bytes, max_pixels: int = MAX_PIXELS, exif: ExifTurn = "ignore") -> Picture:
    """The image in `data` as the processors of transformers make RGB of it, its metadata dropped.

    Transparency is composited on white, as in their `convert_to_rgb`. Grey of more than 8 bits, which they clip to
    white, is scaled instead (`_grey_of_8_bits`). Of an animation or a TIFF of several pages the first is taken.

    Because the metadata is dropped, no later library call can apply EXIF data. A TIFF has its orientation in a tag of
    its own, which Pillow's decoder always follows.

    An image of more than `max_pixels`, `MAX_SIDE` or `MAX_SCANS` is refused before any pixel is decoded. Pillow's own
    limit (`Image.MAX_IMAGE_PIXELS`) holds as well.

    Raises:
        UnusableSample: If the file has another format, is too large, empty, truncated or damaged.
    """
    suffix = _suffix_of(data)
    try:
        if suffix == "tif":
            _check_tags(data)
        elif suffix == "jpg":
            data = _without_more_exif(data)
        with Image.open(io.BytesIO(data), formats=(FORMATS[suffix],)) as image:
            _check_size(image, max_pixels)
            if suffix == "jpg" and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
                found = f"a JPEG of {scans} scans, at most {MAX_SCANS} are decoded"
                raise UnusableSample("image_too_large", f"{found}; save the image again")
            if suffix == "tif":
                _check_strips(image)
            return _picture(image, exif)
    except UnidentifiedImageError as error:  # its own text has a memory address
        found = f"{len(data)} bytes that begin as {FORMATS[suffix]} does; what follows is damaged or not supported"
        raise UnusableSample("broken_image", found) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # The warning arrives as an exception where warnings are errors.
        raise UnusableSample("image_too_large", str(error)) from error
    except _DECODER_ERRORS as error:
        raise UnusableSample("broken_image", f"{len(data)} bytes could not be decoded: {error}") from error


def convert_image(image: Image.Image, max_pixels: int = MAX_PIXELS, exif: ExifTurn = "ignore") -> Image.Image:
    """An image that another library opened, as `decode_image` would give it; the image itself stays as it is.

    Raises:
        UnusableSample: If it is too large, truncated, damaged or of colours that are not read.
    """
    _check_size(image, max_pixels)
    info = dict(image.info)
    try:
        return _picture(image, exif).image
    except _DECODER_ERRORS as error:
        raise UnusableSample("broken_image", f"an image that could not be decoded: {error}") from error
    finally:
        image.info = info


def _picture(image: Image.Image, exif: ExifTurn) -> Picture:
    image.load()
    turn = None if image.format == "TIFF" else _TURNS.get(_orientation(image))
    rgb = _to_rgb(image)
    if turn is not None and exif == "apply":
        rgb = rgb.transpose(turn)
    rgb.info = {}
    return Picture(rgb, is_turned=turn is not None)


def _suffix_of(data: bytes) -> ImageSuffix:
    """What the first bytes say the file is; names what is no image that is read."""
    if not data:
        raise UnusableSample("empty_image", "the file is empty; an interrupted download leaves such files")
    if (suffix := image_suffix(data)) is not None:
        return suffix
    start = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    other = next((name for opening, name in _OTHER_FILES if start.startswith(opening)), None)
    if data[4:8] == b"ftyp":
        other = "a HEIC, AVIF or video file"
    found = other or f"a file that begins with {data[:8]!r}"
    raise UnusableSample("unsupported_image", f"{found}; expected {FORMAT_NAMES}")


def _check_size(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        found = f"{image.width}x{image.height} pixels, at most {max_pixels} are decoded"
        raise UnusableSample("image_too_large", f"{found}; shrink the image or raise the limit")
    if max(image.size) > MAX_SIDE:
        found = f"{image.width}x{image.height} pixels, at most {MAX_SIDE} are decoded on a side"
        raise UnusableSample("image_too_large", f"{found}; cut the image")


def _check_tags(data: bytes) -> None:
    """Refuses a TIFF with more tags, or more numbers in one, than an image needs, before Pillow reads them."""
    order, is_big = ("<" if data[:2] == b"II" else ">"), 43 in data[2:4]
    (start,) = struct.unpack_from(f"{order}{'Q' if is_big else 'L'}", data, 8 if is_big else 4)
    head = struct.Struct(f"{order}{'Q' if is_big else 'H'}")
    entry = struct.Struct(f"{order}HH{'Q8x' if is_big else 'L4x'}")
    (num_tags,) = head.unpack_from(data, start)
    if num_tags > MAX_TIFF_TAGS:
        found = f"a TIFF of {num_tags} tags, at most {MAX_TIFF_TAGS} are read"
        raise UnusableSample("image_too_large", f"{found}; save the image again")
    for number in range(num_tags):
        tag, kind, count = entry.unpack_from(data, start + head.size + number * entry.size)
        # Of bytes and text no numbers are made.
        if kind not in (1, 2, 6, 7) and count > MAX_TIFF_NUMBERS:
            found = f"a TIFF whose tag {tag} has {count} numbers, at most {MAX_TIFF_NUMBERS} are read"
            raise UnusableSample("image_too_large", f"{found}; save the image again")


def _check_strips(image: ImageFile.ImageFile) -> None:
    """Refuses a TIFF that names the same rows as often as it likes: each time they would be decoded."""
    covered = sum(
        (right - left) * (bottom - top)
        for left, top, right, bottom in (tile.extents or (0, 0, 0, 0) for tile in image.tile)
    )
    if covered > MAX_LAYERS * image.width * image.height:
        found = f"a TIFF whose strips have {covered} pixels in all for {image.width}x{image.height} of the image"
        raise UnusableSample("broken_image", f"{found}; save the image again")


def _without_more_exif(data: bytes) -> bytes:
    """The JPEG with only the first of its EXIF segments called so: Pillow joins all of them and reads them at once."""
    found, at = [], 2
    while (at := data.find(b"\xff", at)) >= 0 and data[at + 1 : at + 2] not in (b"", b"\xda"):
        if data[at + 1] == 0xFF:
            at += 1
        elif data[at + 1] in _BARE_MARKERS:
            at += 2
        else:
            if data[at + 1] == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
                found.append(at + 4)
            at += 2 + max(2, int.from_bytes(data[at + 2 : at + 4]))
    if len(found) < 2:
        return data
    changed = bytearray(data)
    for start in found[1:]:
        changed[start : start + 4] = b"more"
    return bytes(changed)


def _orientation(image: Image.Image) -> int:
    """What EXIF or XMP data say of a loaded image; 1 (upright) where they are damaged or say nothing.

    Of EXIF data the first `MAX_EXIF_BYTES` are read; those written as text are not read at all where they are longer.
    """
    image.info["exif"] = image.info.get("exif", b"")[:MAX_EXIF_BYTES] or None
    if len(image.info.get(_EXIF_AS_TEXT, "")) > 2 * MAX_EXIF_BYTES:
        del image.info[_EXIF_AS_TEXT]
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _DECODER_ERRORS:
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey_of_8_bits(image).convert("RGB")
    if image.mode == "LAB":
        raise UnusableSample("unsupported_image", "a TIFF of LAB colours; save it in RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    # Pillow turns grey with premultiplied alpha into no other colours.
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _grey_of_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits or of floating point, in 8 bits.

    Of 16 bits (of a TIFF also 12) the highest 8 are kept, as Pillow does with colours of 16 bits: an image that was
    made from 8 bits comes back, whether it was shifted or multiplied by 257. Numbers of 32 bits have no agreed white.
    The least of `WHITES` that no value exceeds by more than a tenth is taken for it, and what lies above becomes white;
    where values are negative or larger, the lowest becomes black and the highest white.
    """
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16"):
        scale = 256 / 2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0]
        grey = image.convert("I").point(lambda value: value * scale)
    else:
        if not np.isfinite(np.asarray(image)).all():
            raise UnusableSample("unsupported_image", "grey in floating point with values that are no finite numbers")
        extrema: Any = image.getextrema()
        low, high = extrema
        white = next((white for white in WHITES if low >= 0 and high <= OVERSHOOT * white), None)
        low, high = (low, high) if white is None else (0, white)
        scale = 255 / ((high - low) or 1)
        grey = image.point(lambda value: value * scale + (0.5 - low * scale))
    grey = grey.convert("L")
    if tags.get(_PHOTOMETRIC) == 0:  # 0 is white, which Pillow follows for up to 8 bits
        grey = ImageOps.invert(grey)
    if (hidden := image.info.get("transparency")) is not None:
        grey.info.pop("transparency", None)
        grey.paste(255, mask=Image.fromarray(np.asarray(image) == hidden))
    return grey
