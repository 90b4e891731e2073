"""Reads compositional suites in SugarCrepe's layout: `KIND.json` files beside a folder of images.

A file maps keys to `{"filename": ..., "caption": ..., "negative_caption": ...}`. Its name says how the negative caption
was made, such as `swap_obj`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from storage.digests import parse_json
from storage.errors import UserError
from storage.regular_files import is_regular, read_regular

MAX_SUITE_BYTES: Final = 256 * 2**20
"""Largest file of pairs, which is read whole: about a million of them."""
_FIELDS: Final = ("filename", "caption", "negative_caption")


@dataclass(frozen=True)
class CaptionPair:
    """An image with a caption that fits it and one that does not."""

    kind: str
    key: str
    image: Path
    caption: str
    negative_caption: str


def load_pairs(
    folder: Path, images: Path | None = None, kinds: Sequence[str] | None = None, limit: int | None = None
) -> dict[str, list[CaptionPair]]:
    """The first `limit` pairs of each kind: kinds in the order asked for, or by name, pairs in the order of their file.

    Images are in `folder/images` unless another folder is named.

    Raises:
        UserError: If a folder, file, kind or image is missing, JSON has another layout, or a file name leaves the
            folder of images.
    """
    images = folder / "images" if images is None else images
    for path in (folder, images):
        if not path.is_dir():
            raise UserError(f"{path} is not a folder; expected KIND.json files in it and the images in images/")
    found = {path.stem: path for path in sorted(folder.glob("*.json"))}
    if not found:
        raise UserError(f"{folder} holds no KIND.json file")
    wanted = list(found) if kinds is None else list(kinds)
    if unknown := [kind for kind in wanted if kind not in found]:
        raise UserError(f"{folder} has no kind {', '.join(unknown)}; it has {', '.join(found)}")
    return {kind: list(islice(_read_kind(kind, found[kind], images), limit)) for kind in wanted}


def _read_kind(kind: str, path: Path, images: Path) -> Iterator[CaptionPair]:
    entries = parse_json(read_regular(path, MAX_SUITE_BYTES), str(path), "fetch the suite again")
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"{path}: expected an object of pairs, key to pair, with at least one")
    root = images.resolve()
    for key, entry in entries.items():
        if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in _FIELDS):
            raise UserError(f"{path}, pair {key!r}: {entry!r:.200}; expected strings {', '.join(_FIELDS)}")
        image = root / entry["filename"]
        try:
            inside = image.resolve().is_relative_to(root)
        except (RuntimeError, OSError, ValueError):  # a loop of links, or what cannot be a path
            inside = True
        if not inside:
            raise UserError(f"{path}, pair {key!r}: file name {entry['filename']!r} leaves the folder {images}")
        if not is_regular(image):
            raise UserError(
                f"{path}, pair {key!r}: no image {entry['filename']!r} in {images}; name the folder of images"
            )
        yield CaptionPair(kind, key, image, entry["caption"], entry["negative_caption"])
