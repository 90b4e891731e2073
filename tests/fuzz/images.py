"""Image files of a stranger, in every format that is read."""

from pathlib import Path

from hypothesis import strategies as st
from PIL import Image

from stages.images import FORMATS, read_picture
from stages.unusable_sample import UnusableSample
from storage.errors import UserError
from tests.fuzz.attempt import Mutant, Target
from tests.fuzz.mutants import spoiled_bytes


def make(root: Path) -> None:
    """A small picture in each format, with EXIF data where the format has them; TIFF also compressed and in floats."""
    root.mkdir()
    picture = Image.merge("RGB", [Image.linear_gradient("L").rotate(turn).resize((24, 18)) for turn in (0, 90, 180)])
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    for suffix, kind in FORMATS.items():
        picture.save(root / f"a.{suffix}", kind, exif=exif)
    picture.save(root / "b.jpg", "JPEG", progressive=True)
    picture.convert("RGBA").save(root / "b.png", "PNG")
    picture.convert("F").save(root / "b.tif", "TIFF")
    picture.save(root / "c.tif", "TIFF", compression="tiff_lzw", big_tiff=True)
    picture.convert("P").save(root / "b.bmp", "BMP")


def read(root: Path) -> None:
    """Each file; pixels may differ."""
    for path in sorted(root.iterdir()):
        try:
            read_picture(path.read_bytes(), exif="apply")
        except UnusableSample as why:
            raise UserError(f"{path}: {why}") from why


def mutants(root: Path) -> st.SearchStrategy[Mutant]:
    """One file is spoiled."""
    return st.one_of([_spoiled(path.name, path.read_bytes()) for path in sorted(root.iterdir())])


def _spoiled(name: str, sound: bytes) -> st.SearchStrategy[Mutant]:
    def writes(data: bytes) -> Mutant:
        return lambda copy: (copy / name).write_bytes(data) and None

    return spoiled_bytes(sound).map(writes)


TARGETS = [Target("images", make, read, mutants)]
