"""Where objects are in pictures, as users give it: a file of boxes and masks, or marks of a suite."""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stages.evaluation.loaded_suite import LoadedSuite
from stages.evaluation.suites.pictures import Mark, MaskMark, PictureFile, PictureSource
from stages.samples.sources.data_file import open_source
from storage.errors import UserError
from storage.printable import printable
from storage.regular_files import read_regular

Box = tuple[float, float, float, float]
RASTER: Final = 512
"""Coverage is counted on a raster of so many points along each side of the picture."""
MAX_MASK_BYTES: Final = 2**26
MAX_MASK_PIXELS: Final = 2**26
_NAMES: Final = ("sample", "image", "sha256")


@dataclass(frozen=True)
class ObjectPlaces:
    """Objects of one picture: boxes in fractions (left, top, right, bottom), and files of masks."""

    boxes: tuple[Box, ...] = ()
    masks: tuple[Path, ...] = ()

    def covered(self) -> NDArray[np.bool_]:
        """`[RASTER, RASTER]`: which points of the picture belong to an object.

        Raises:
            UserError: If the mask cannot be read.
        """
        found = np.zeros((RASTER, RASTER), dtype=bool)
        for mask in self.masks:
            found |= _mask(mask)
        # Each box adds 1 behind its left top corner and takes it away behind the others, however many there are.
        changes = np.zeros((RASTER + 1, RASTER + 1), dtype=np.int64)
        edges_J4 = np.ceil(np.array(self.boxes).reshape(-1, 4) * RASTER - 0.5).astype(np.int64)
        left, top, right, bottom = edges_J4.T
        for rows, columns, sign in ((top, left, 1), (top, right, -1), (bottom, left, -1), (bottom, right, 1)):
            np.add.at(changes, (rows, columns), sign)
        return found | (changes.cumsum(0).cumsum(1)[:RASTER, :RASTER] > 0)


@dataclass(frozen=True)
class ObjectFile:
    """Objects by what names their picture."""

    by_sample: Mapping[str, ObjectPlaces]
    by_image: Mapping[str, ObjectPlaces]
    by_digest: Mapping[str, ObjectPlaces]

    def __len__(self) -> int:
        return len(self.by_sample) + len(self.by_image) + len(self.by_digest)

    def of(self, key: str, record: Mapping[str, Any], image: bytes) -> ObjectPlaces | None:
        """The objects of a sample's only image; None if the file does not name it."""
        names = record.get("image")
        name = names[0] if isinstance(names, list) and names else names
        digest = hashlib.sha256(image).hexdigest() if self.by_digest else ""
        found = self.by_sample.get(key) or self.by_sample.get(str(record.get("id"))) or self.by_digest.get(digest)
        return found or (self.by_image.get(name) if isinstance(name, str) else None)


def read_objects(path: Path) -> ObjectFile:
    """Reads JSON lines, a JSON list or a table; docs/attention.md#where-objects-are says what a record holds.

    Raises:
        UserError: If a record is not understood; names it by its number, from 1.
    """
    places: dict[str, dict[str, ObjectPlaces]] = {name: {} for name in _NAMES}
    with open_source(path) as source:
        for number, record in enumerate(source.scan(), 1):
            where = f"{path}, record {number}"
            if not isinstance(record, dict):
                raise UserError(f"{where}: expected an object, found {printable(str(record)):.100}")
            named = [name for name in _NAMES if isinstance(record.get(name), str)]
            if len(named) != 1:
                raise UserError(f"{where} names its picture by {named or 'nothing'}; expected one of {list(_NAMES)}")
            listed, mask = record.get("boxes") or [], record.get("mask")
            if not isinstance(listed, list | tuple) or not (mask is None or isinstance(mask, str)):
                raise UserError(f"{where}: expected a list as boxes and the name of a file as mask")
            boxes = tuple(checked_box(box, where) for box in listed)
            if not boxes and not mask:
                raise UserError(f"{where} has neither boxes nor a mask; leave pictures without objects out")
            masks = (_inside(path.parent, mask, where),) if mask else ()
            of_kind, name = places[named[0]], record[named[0]]
            known = of_kind.get(name, ObjectPlaces())
            if known.masks and masks:
                raise UserError(f"{where} gives {printable(name)!r:.100} a second mask; join them into one")
            of_kind[name] = ObjectPlaces(known.boxes + boxes, known.masks + masks)
    if not any(places.values()):
        raise UserError(f"{path} names no objects; expected a record for each picture")
    return ObjectFile(places["sample"], places["image"], places["sha256"])


def objects_of_suite(loaded: LoadedSuite) -> ObjectFile:
    """The boxes and masks that a suite's questions mark, such as R-Bench's, by the sha256 of their pictures.

    Raises:
        UserError: If its questions mark nothing.
    """
    digests: dict[PictureSource, str] = {}
    found: dict[str, ObjectPlaces] = {}
    for picture in (each for item in loaded.items for question in item.questions for each in question.pictures):
        if picture.source not in digests:
            digests[picture.source] = hashlib.sha256(picture.source.read()).hexdigest()
        known = found.get(digests[picture.source], ObjectPlaces())
        boxes = tuple(mark.box for mark in picture.marks if isinstance(mark, Mark))
        sources = (mark.mask for mark in picture.marks if isinstance(mark, MaskMark))
        masks = tuple(source.path for source in sources if isinstance(source, PictureFile))
        found[digests[picture.source]] = ObjectPlaces(
            tuple(dict.fromkeys(known.boxes + boxes)), tuple(dict.fromkeys(known.masks + masks))
        )
    found = {digest: places for digest, places in found.items() if places.boxes or places.masks}
    if not found:
        raise UserError(
            f"questions of {loaded.suite.name} mark no objects; those of r-bench-boxes and r-bench-masks do"
        )
    return ObjectFile({}, {}, found)


def checked_box(box: Any, where: str) -> Box:
    """Left, top, right, bottom as fractions of the picture.

    Raises:
        UserError: If it is something else, or empty.
    """
    is_list = isinstance(box, list | tuple) and len(box) == 4
    if not is_list or any(isinstance(edge, bool) or not isinstance(edge, int | float) for edge in box):
        raise UserError(f"{where}: the box {printable(repr(box)):.100} is not left, top, right, bottom")
    left, top, right, bottom = box
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        found = f"{where}: the box {box!r:.100} is not within 0 to 1, or is empty"
        raise UserError(f"{found}; give fractions of the picture's width and height")
    return float(left), float(top), float(right), float(bottom)


def _inside(folder: Path, name: str, where: str) -> Path:
    try:
        if (folder / name).resolve().is_relative_to(folder.resolve()):
            return folder / name
    except (RuntimeError, OSError, ValueError):  # a loop of links, or what cannot be a path
        pass
    raise UserError(f"{where}: the mask {printable(name)!r:.100} is no file below {folder}; put masks beside the file")


def _mask(path: Path) -> NDArray[np.bool_]:
    """Where a picture of one channel is not 0."""
    try:
        data = read_regular(path, MAX_MASK_BYTES)
        with Image.open(io.BytesIO(data), formats=("PNG",)) as mask:
            if mask.mode not in {"1", "L", "P"} or mask.width * mask.height > MAX_MASK_PIXELS:
                found = f"{path}: {mask.width}x{mask.height} pixels of mode {mask.mode}"
                raise UserError(f"{found}; expected a PNG of one channel, 0 for background")
            grey = mask if mask.mode != "1" else mask.convert("L")
            pixels = Image.frombytes("L", grey.size, grey.tobytes()).resize((RASTER, RASTER), Image.Resampling.NEAREST)
            return np.asarray(pixels) > 0
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no mask in PNG format ({error}); name one that is") from error
