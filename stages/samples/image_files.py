"""Reads image files of one folder: never outside it, never too large, each distinct one decoded once."""

import errno
from pathlib import Path

from stages.conversations.turns import shorten
from stages.images import read_picture
from stages.unusable_sample import UnusableSample
from storage.errors import UserError
from storage.regular_files import read_regular, stays_inside


class ImageFolder:
    """The images a data file names, by path relative to `root`, or holds itself."""

    def __init__(self, root: Path | None, max_pixels: int, max_bytes: int) -> None:
        """`max_pixels` bounds width times height, `max_bytes` the file; without a `root` there are no files."""
        if root is not None and not root.is_dir():
            raise UserError(f"no image folder at {root}; give the folder that image paths are relative to")
        self._root, self._max_pixels, self._max_bytes = root and root.resolve(), max_pixels, max_bytes
        self._verdicts: dict[str, UnusableSample | None] = {}
        self.turned: set[str] = set()
        """Those read whose EXIF data ask for a turn."""

    def read(self, relative: str, held: bytes | None = None) -> bytes:
        """The file's bytes as they are, or those that the data file `held`, after they were decoded once in full.

        Raises:
            UnusableSample: If the file is missing, outside the folder, too large, or not an image.
            UserError: If the file exists and cannot be read.
        """
        if (verdict := self._verdicts.get(relative)) is not None:
            raise verdict
        try:
            data = self._read_bytes(relative) if held is None else self._bounded(relative, held)
            if relative not in self._verdicts:
                self._check(relative, data)
        except UnusableSample as why:
            self._verdicts[relative] = why
            raise
        self._verdicts[relative] = None
        return data

    def _check(self, relative: str, data: bytes) -> None:
        try:
            if read_picture(data, self._max_pixels).is_turned:
                self.turned.add(relative)
        except UnusableSample as why:
            raise UnusableSample(why.reason, f"{relative}: {why.detail}") from why

    def _bounded(self, name: str, data: bytes) -> bytes:
        if len(data) > self._max_bytes:
            raise UnusableSample("image_too_large", f"{name} has {len(data):,} bytes")
        return data

    def _read_bytes(self, relative: str) -> bytes:
        if self._root is None:
            raise UnusableSample("missing_image", f"{relative} is a path, and no image folder was given")
        try:
            path = (self._root / relative).resolve()
            if not stays_inside(path, self._root):
                raise UnusableSample("path_leaves_folder", f"{relative} is a link to something outside the folder")
            # Also keeps out pipes and devices, which would block or never end.
            if not path.is_file():
                above = Path(relative).parts[:1] == (self._root.name,) and (self._root.parent / relative).is_file()
                hint = "; it is one of the folder above, so give that" if above else ""
                raise UnusableSample("missing_image", f"{relative} is not a file of the image folder{hint}")
            if (num_bytes := path.stat().st_size) > self._max_bytes:
                raise UnusableSample("image_too_large", f"{relative} has {num_bytes:,} bytes")
            return read_regular(path, self._max_bytes)
        except RuntimeError as error:  # a loop of symbolic links
            raise UnusableSample("missing_image", f"{relative} is a link to itself") from error
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                found = f"{shorten(relative)} is longer than the name of a file may be"
                raise UnusableSample("missing_image", found) from error
            raise UserError(
                f"image {relative} in {self._root} cannot be read: {error.strerror}; mend that and run again"
            ) from error
