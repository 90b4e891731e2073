"""Decodes the bytes of an image: bounded in size, of a few known formats, or refused with a named reason."""

import io
import struct
import zlib
from typing import Final

from PIL import Image

from stages.unusable_sample import UnusableSample

FORMATS: Final = ("JPEG", "PNG", "WEBP")
MAX_PIXELS: Final = 50_000_000
MAX_SIDE: Final = 2**16
"""A row costs Pillow more than its pixels do: 50 million rows of one pixel take a gigabyte."""
MAX_SCANS: Final = 500
"""Scans of a progressive JPEG; each goes over the whole image, and encoders write about ten."""

_DECODER_ERRORS: Final = (OSError, SyntaxError, ValueError, IndexError, TypeError, EOFError, struct.error, zlib.error)


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The RGB image in `data`, its pixels as stored and its metadata dropped.

    Orientation in EXIF is not applied: LLaVA's own preprocessing does not, and region annotations refer to
    the stored pixels. Because the metadata is dropped, no later library call can apply it either.
    Transparency is dropped, not blended; of an animation the first frame is taken.

    An image of more than `max_pixels`, `MAX_SIDE` or `MAX_SCANS` is refused before any pixel is decoded. Pillow's own
    limit (`Image.MAX_IMAGE_PIXELS`) holds as well.

    Raises:
        UnusableSample: If the file has another format, is too large, empty, truncated or damaged.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                found = f"{image.width}x{image.height} pixels, at most {max_pixels} are decoded"
                raise UnusableSample("image_too_large", f"{found}; shrink the image or raise the limit")
            if max(image.size) > MAX_SIDE:
                found = f"{image.width}x{image.height} pixels, at most {MAX_SIDE} are decoded on a side"
                raise UnusableSample("image_too_large", f"{found}; cut the image")
            if image.format == "JPEG" and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
                found = f"a JPEG of {scans} scans, at most {MAX_SCANS} are decoded"
                raise UnusableSample("image_too_large", f"{found}; save the image again")
            image.load()
            # From a palette with transparency over RGBA: the same colours, without Pillow's warning.
            has_transparency = image.mode == "P" and "transparency" in image.info
            rgb = (image.convert("RGBA") if has_transparency else image).convert("RGB")
            rgb.info = {}
            return rgb
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # The warning arrives as an exception where warnings are errors.
        raise UnusableSample("image_too_large", str(error)) from error
    except _DECODER_ERRORS as error:
        if not _has_known_signature(data):
            detail = f"a file that begins with {data[:8]!r}; expected JPEG, PNG or WebP"
            raise UnusableSample("unsupported_image", detail) from error
        raise UnusableSample("broken_image", f"{len(data)} bytes could not be decoded: {error}") from error


def _has_known_signature(data: bytes) -> bool:
    return (
        not data
        or data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"))
        or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")
    )
