"""The images that a record names or holds: paths, bytes, base64 data URLs."""

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from stages.conversations.turns import is_unicode, shorten
from stages.samples.layouts.fields import is_empty
from stages.unusable_sample import UnusableSample

_DATA_URL = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(;[\w=.-]+)*;base64,(?P<data>.*)", re.DOTALL | re.IGNORECASE)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_FILE_URL = re.compile(r"file:(?://(?:localhost(?=/))?|(?=/))", re.IGNORECASE)
"""What stands before the path in a URL of a file here: `file://`, `file://localhost` or `file:`."""
SOURCE_KEYS = ("bytes", "path", "url")
"""Keys of an object that is an image; the first that is filled counts."""


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One image of a record."""

    name: str
    """Path relative to the image folder; `sha256:` and the digest of its bytes if the record holds them."""
    data: bytes | None = None
    """The encoded image, if the record holds it."""


def parse_image(found: object, root: Path | None) -> ImageRef:
    """One image: a path, a `file://` or data URL, bytes, or an object that has one of them.

    Raises:
        UnusableSample: If it is none of these, or a path that is not in the folder `root`.
    """
    if isinstance(found, Mapping):
        found = next((found[key] for key in SOURCE_KEYS if not is_empty(found.get(key))), found)
    if isinstance(found, bytes):
        return ImageRef(f"sha256:{sha256(found).hexdigest()}", found)
    if not isinstance(found, str) or not found.strip():
        raise UnusableSample("bad_image_field", f"image is {shorten(found)}, expected a path or a list of paths")
    if found[:5].lower() == "data:":
        return parse_image(_decoded(found), root)
    if url := _FILE_URL.match(found):
        # Bytes that are no UTF-8 become what no file can be named, so that it is said.
        found = unquote(found[url.end() :], errors="surrogateescape")
    return ImageRef(_relative(found, root))


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
