"""Sizes and digests of a committed folder's files, packed: an open store holds one table a shard, of some 40 files."""

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, TypeAdapter

from storage.stores import FileInfo, relative_path

_DIGEST_BYTES = 32
_NAMES: dict[tuple[str, ...], tuple[str, ...]] = {}
"""Names that were seen, once each: nearly all shards of a store have the same."""

_Files = TypeAdapter(
    dict[str, tuple[Annotated[int, Field(ge=0, lt=2**63)], Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]]]
)


class FileTable(Mapping[str, FileInfo]):
    """Path in the folder -> (bytes, sha256), in 40 bytes a file; as a dict of them it would take 350."""

    __slots__ = ("_digests", "_names", "_sizes")

    def __init__(self, files: Mapping[str, FileInfo]) -> None:
        names = tuple(sorted(files))
        self._names = _NAMES.setdefault(names, names)
        self._sizes = array("q", [files[name].bytes for name in names])
        self._digests = b"".join(bytes.fromhex(files[name].sha256) for name in names)

    @classmethod
    def validated(cls, files: object) -> "FileTable":
        """The table of a record.

        Raises:
            ValueError: If a path does not stay inside the folder, or a size or digest is none.
        """
        checked = _Files.validate_python(dict(files) if isinstance(files, FileTable) else files)
        for name in checked:
            relative_path(name)
        return cls({name: FileInfo(*info) for name, info in checked.items()})

    def __getitem__(self, name: str) -> FileInfo:
        row = bisect_left(self._names, name)
        if row == len(self) or self._names[row] != name:
            raise KeyError(name)
        start = row * _DIGEST_BYTES
        return FileInfo(self._sizes[row], self._digests[start : start + _DIGEST_BYTES].hex())

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"FileTable({dict(self)})"


StoredFiles = Annotated[FileTable, BeforeValidator(FileTable.validated), PlainSerializer(dict[str, Any])]
"""Field of a record."""
