"""Reads a suite's files from the folder that holds them; what is missing is named with where to get it."""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Final
from zipfile import BadZipFile, ZipFile

from stages.evaluation.suites.pictures import PictureFile, PictureInZip, PictureSpool, SuitePicture
from stages.samples.sources.data_file import open_source
from stages.unusable_sample import UnusableSample
from storage.digests import parse_json
from storage.errors import UserError
from storage.printable import printable
from storage.regular_files import is_folder, is_regular, read_regular, stays_inside

MAX_SUITE_BYTES: Final = 2**30
"""Largest file of items that is read whole; VQAv2's answers are the largest known, 0.6 GB for the training half."""


@dataclass(frozen=True)
class SuiteFiles:
    """The folder of a suite.

    Attributes:
        folder: holds the suite's files.
        images: holds the pictures, where they are not where the suite's makers put them; None is there.
        fetch: what to fetch from where, for errors.
    """

    folder: Path
    images: Path | None
    fetch: str
    _spool: PictureSpool = field(default_factory=PictureSpool, init=False, repr=False, compare=False)

    def find(self, *patterns: str) -> list[Path]:
        """Files that match any pattern, in order of the patterns and then by name.

        Raises:
            UserError: If there is none.
        """
        if not is_folder(self.folder):
            raise UserError(
                f"{self.folder} is not a folder; expected one with {' or '.join(patterns)}; fetch {self.fetch}"
            )
        found = self.find_any(*patterns)
        if not found:
            raise UserError(f"{self.folder} holds no {' or '.join(patterns)}; fetch {self.fetch}")
        return found

    def find_any(self, *patterns: str) -> list[Path]:
        """As `find`, where there need be none."""
        return [path for pattern in patterns for path in sorted(self.folder.glob(pattern))]

    def tables(self) -> list[Path]:
        """A data set of the Hub: its Parquet files in `data/` or the folder, or the folder if it was saved there."""
        return [self.folder] if self.has("state.json") else self.find_any("data/*.parquet", "*.parquet")

    def has(self, name: str) -> bool:
        """Whether the folder has this file."""
        return is_regular(self.folder / name)

    def need(self, *names: str) -> list[Path]:
        """These files.

        Raises:
            UserError: If any is missing; lists all that are.
        """
        if missing := [name for name in names if not self.has(name)]:
            raise UserError(f"{self.folder} lacks {', '.join(missing)}; fetch {self.fetch}")
        return [self.folder / name for name in names]

    def first(self, *names: str) -> Path:
        """The first of these files that the folder has.

        Raises:
            UserError: If it has none.
        """
        return self.find(*names)[0]

    def text(self, path: Path) -> str:
        """The content of a text file; what is not UTF-8 is replaced."""
        return read_regular(path, MAX_SUITE_BYTES).decode("utf-8-sig", errors="replace")

    def json(self, path: Path) -> Any:
        """The content of a JSON file."""
        return parse_json(read_regular(path, MAX_SUITE_BYTES), str(path), f"fetch it again: {self.fetch}")

    def rows(self, path: Path) -> Iterator[dict[str, Any]]:
        """The records of JSON lines, a JSON list, Parquet files or a saved data set, whatever the file's name.

        Images that a record holds, as bytes or as the Hub's `{"bytes", "path"}`, become pictures. Their bytes are
        copied into a temporary file, so that memory holds at most those of a row group.

        Raises:
            UserError: If the file cannot be read, or a record is no object.
        """
        with open_source(path) as source:
            for position, record in enumerate(source.scan()):
                if isinstance(record, UnusableSample):
                    raise UserError(f"{path}, record {position}: {record}; fetch it again: {self.fetch}")
                if not isinstance(record, dict):
                    raise UserError(f"{path}, record {position}: {record!r:.100}; expected an object")
                yield {name: self._cell(value, f"{path}: record {position}, {name}") for name, value in record.items()}

    def _cell(self, value: Any, name: str) -> Any:
        if isinstance(value, dict) and set(value) == {"bytes", "path"}:
            if value["bytes"] is None:
                return value["path"] and self.picture(value["path"])
            value = value["bytes"]
        return SuitePicture(self._spool.add(value, name)) if isinstance(value, bytes) else value

    def csv(self, path: Path, delimiter: str = ",") -> Iterator[dict[str, str]]:
        """The rows of a table with a header."""
        try:
            yield from csv.DictReader(io.StringIO(self.text(path)), delimiter=delimiter, restval="")
        except csv.Error as error:
            raise UserError(f"{path} is no table ({error}); fetch it again: {self.fetch}") from error

    def records(self, path: Path, *, key: str = "") -> list[Any]:
        """The list in a JSON file, or under a key of its object.

        Raises:
            UserError: If it is none, or empty.
        """
        found = self.json(path)
        listed = found.get(key) if key and isinstance(found, dict) else found
        if not isinstance(listed, list) or not listed:
            where = f"an object with a list {key!r}" if key else "a list"
            raise UserError(f"{path}: expected {where} that is not empty; fetch it again: {self.fetch}")
        return listed

    def picture(self, *places: str) -> SuitePicture:
        """The first of these files that exists, within the folder of images if one was named; else one for the error.

        A suite gives each place as its makers have it, such as `val2017/000000085329.jpg`. In a folder of images that
        was named, also the bare file name is looked for.

        Raises:
            UserError: If a path leaves the folder, by its name or by a link other than those of the Hub's cache.
        """
        root = self.folder if self.images is None else self.images
        names = places if self.images is None else [*places, *(place.rsplit("/", 1)[-1] for place in places)]
        paths = [self._inside(root, name) for name in names]
        absent = paths[0] if self.images is None else paths[-1]
        return SuitePicture(PictureFile(next((path for path in paths if is_regular(path)), absent)))

    def zipped(self, *archives: str) -> dict[str, SuitePicture]:
        """The members of the first of these archives that exists, by their bare file names.

        None where a folder of images was named, or there is no such archive.

        Raises:
            UserError: If the archive is damaged.
        """
        found = [self.folder / name for name in archives if self.has(name)]
        if self.images is not None or not found:
            return {}
        try:
            with ZipFile(found[0]) as archive:
                members = archive.namelist()
        except BadZipFile as error:
            raise UserError(f"{found[0]} is no whole zip archive ({error}); fetch it again: {self.fetch}") from error
        return {member.rsplit("/", 1)[-1]: SuitePicture(PictureInZip(found[0], member)) for member in members}

    def _inside(self, root: Path, name: str) -> Path:
        path, folder = root / name, root.resolve()
        try:
            followed = path.resolve()
        except (RuntimeError, OSError, ValueError):  # a loop of links, or what cannot be a path
            return path
        if not stays_inside(followed, folder):
            shown = f"{printable(name)!r:.200}"
            if ".." in PurePath(name).parts or PurePath(name).is_absolute():
                raise UserError(f"{self.folder}: file name {shown} leaves the folder {root}; {self.fetch}")
            found = f"{self.folder}: {shown} is behind a link to {printable(str(followed))}, outside of {root}"
            raise UserError(f"{found}; put the files themselves there, or name the folder that has them with --images")
        return path


def fields(record: Any, where: str, **types: type | tuple[type, ...]) -> list[Any]:
    """The fields of a record in the order asked for, each of its type; a truth value is no number.

    Raises:
        UserError: If it is no object or a field is missing or of another type; names it.
    """
    if not isinstance(record, dict):
        raise UserError(f"{where}: {record!r:.200}; expected an object with {', '.join(types)}")
    for name, kind in types.items():
        value = record.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            found = repr(record[name])[:100] if name in record else f"only {', '.join(map(str, record))[:200]}"
            names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
            raise UserError(f"{where}: expected {name} of type {names}, found {found}")
    return [record[name] for name in types]
