"""Reads parts of a shard's arrays: what is missing or damaged, or larger than its metadata says, is an error.

Zarr itself reads a missing chunk as the fill value, and takes longer to begin than most chunks here take to decode.
"""

import os
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs.checksum32 import CRC32C
from numcodecs.zstd import Zstd

from storage.regular_files import open_regular
from storage.targets.chunk_bounds import ArrayMetadata, UnsoundChunk, zstd_frame_bytes

_Array = np.ndarray[Any, Any]
_CRC32C, _ZSTD = CRC32C(), Zstd()
_LEFT_OUT = np.iinfo(np.uint64).max


class ArrayReader:
    """Reads one array of a shard's folder, whose metadata was found to be allowed."""

    def __init__(self, folder: Path, name: str, metadata: ArrayMetadata) -> None:
        self.metadata = metadata
        self._key = "/".join([name, "c", *("0" for _ in metadata.shape)])
        self._path = folder / self._key

    def read(self, *selection: slice | list[int]) -> _Array:
        """What is selected, as a new array: in each dimension a slice of step 1, or indices; all where none is given.

        Raises:
            UnsoundChunk: If the file or a needed chunk is missing or cut off, or decodes to another size than declared.
            RuntimeError: If a checksum or the compression is wrong.
        """
        shape, chunk_shape = self.metadata.shape, self.metadata.chunk_shape
        everything = [slice(None)] * (len(shape) - len(selection))
        pieces = list(map(_pieces, [*selection, *everything], shape, chunk_shape))
        result = np.empty([part[-1][1].stop if part else 0 for part in pieces], self.metadata.dtype.newbyteorder("="))
        if result.size:
            try:
                with open_regular(self._path) as file:
                    if (found := os.fstat(file.fileno()).st_size) != self.metadata.file_bytes:
                        raise UnsoundChunk(f"{self._key} has {found} bytes, expected {self.metadata.file_bytes}")
                    for parts in product(*pieces):
                        numbers, to, source = zip(*parts, strict=True)
                        result[to] = self._chunk(file.fileno(), numbers)[source]
            except FileNotFoundError as error:
                raise UnsoundChunk(f"chunk {self._key} is missing") from error
        return result

    def _chunk(self, file: int, numbers: tuple[int, ...]) -> _Array:
        """The inner chunk at one place of the grid."""
        metadata = self.metadata
        start, num_bytes = self._spans[numbers].tolist()
        payload = _CRC32C.decode(os.pread(file, num_bytes, start))
        found = zstd_frame_bytes(payload, self._key) if metadata.compressed else len(payload)
        if found != metadata.chunk_bytes:
            raise UnsoundChunk(f"{self._key}: a chunk decodes to {found} bytes, expected {metadata.chunk_bytes}")
        data = _ZSTD.decode(payload) if metadata.compressed else payload
        return np.frombuffer(data, metadata.dtype).reshape(metadata.chunk_shape)

    @cached_property
    def _spans(self) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """`[*grid, 2]`: first byte and length of each inner chunk in the file. Zarr's index of them is at the end."""
        metadata = self.metadata
        if not metadata.sharded:
            return np.array([0, metadata.file_bytes], np.uint64).reshape(*metadata.grid, 2)
        end = metadata.file_bytes - metadata.index_bytes
        if end < 0:
            raise UnsoundChunk(f"{self._key} has {metadata.file_bytes} bytes, fewer than the index of its chunks")
        with open_regular(self._path) as file:
            index = _CRC32C.decode(os.pread(file.fileno(), metadata.index_bytes, end))
        spans = np.frombuffer(index, "<u8").reshape(*metadata.grid, 2)
        if bool((spans == _LEFT_OUT).any()):
            raise UnsoundChunk(f"{self._key} leaves out one of its {metadata.num_chunks} chunks")
        if bool((spans > end).any() or (spans.sum(axis=-1) > end).any()):
            raise UnsoundChunk(f"{self._key} has chunks in its first {end} bytes, one of its index ends beyond")
        return spans


def _pieces(selected: slice | list[int], size: int, step: int) -> list[tuple[int, slice, slice]]:
    """Of each chunk along one dimension that is needed: its number, where it goes in the result, and what of it."""
    if isinstance(selected, list):
        return [(i // step, slice(n, n + 1), slice(i % step, i % step + 1)) for n, i in enumerate(selected)]
    start, stop, _ = selected.indices(size)
    return [
        (
            first // step,
            slice(max(first, start) - start, min(first + step, stop) - start),
            slice(max(start - first, 0), min(stop - first, step)),
        )
        for first in range(start - start % step, stop, step)
    ]
