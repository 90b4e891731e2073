"""The images that a record names or holds: paths, bytes, base64 data URLs."""

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath

from stages.conversations.turns import is_unicode, shorten
from stages.samples.layouts.fields import is_empty
from stages.unusable_sample import UnusableSample

_DATA_URL = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(;[\w=.-]+)*;base64,(?P<data>.*)", re.DOTALL | re.IGNORECASE)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_SOURCE_KEYS = ("bytes", "path", "url")


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One image of a record."""

    name: str
    """Path relative to the image folder; `sha256:` and the digest of its bytes if the record holds them."""
    data: bytes | None = None
    """The encoded image, if the record holds it."""


def parse_images(found: object, root: Path | None) -> tuple[ImageRef, ...]:
    """The images of `image` or `images`: one, a list, or nothing; absolute paths must lie in the folder `root`.

    Raises:
        UnusableSample: If one is no path, no bytes and no data URL, or a path that leads out of the image folder.
    """
    if is_empty(found):
        return ()
    return tuple(parse_image(each, root) for each in (found if isinstance(found, list | tuple) else (found,)))


def parse_image(found: object, root: Path | None) -> ImageRef:
    """As `parse_images`, of one image: a path, a data URL, bytes, or an object that has one of them."""
    if isinstance(found, Mapping):
        found = next((found[key] for key in _SOURCE_KEYS if not is_empty(found.get(key))), found)
    if isinstance(found, bytes):
        return ImageRef(f"sha256:{sha256(found).hexdigest()}", found)
    if not isinstance(found, str) or not found.strip():
        raise UnusableSample("bad_image_field", f"image is {shorten(found)}, expected a path or a list of paths")
    if found[:5].lower() == "data:":
        return parse_image(_decoded(found), root)
    return ImageRef(_relative(found.removeprefix("file://"), root))


def _decoded(url: str) -> bytes:
    match = _DATA_URL.fullmatch(url)
    try:
        data = base64.b64decode(match["data"], validate=True) if match else b""
    except (binascii.Error, ValueError) as error:
        raise UnusableSample("bad_image_field", f"{shorten(url)} is not base64: {error}") from error
    if not data:
        raise UnusableSample("bad_image_field", f"{shorten(url)} is no data URL with an image in base64")
    return data


def _relative(found: str, root: Path | None) -> str:
    if not is_unicode(found) or "\0" in found:
        raise UnusableSample("bad_image_field", f"image is {shorten(found)}, which no file can be named")
    if _URL.match(found):
        raise UnusableSample("bad_image_field", f"image is the address {shorten(found)}; fetch it and give its path")
    path = PurePosixPath(found)
    if path.is_absolute() and root is not None:
        inside = next(
            (path.relative_to(each) for each in (root.absolute(), root.resolve()) if path.is_relative_to(each)), path
        )
        path = PurePosixPath(inside)
    if path.is_absolute() or ".." in path.parts:
        raise UnusableSample("path_leaves_folder", f"{shorten(found)} is absolute or has '..'")
    return str(path)
