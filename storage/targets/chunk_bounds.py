"""What the metadata of an array and the head of a zstd frame say of decoded sizes, before anything is decoded.

Decoders believe both, so that a few forged bytes could ask for any memory.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from storage.digests import parse_json

MAX_RATIO = 1000
ALWAYS_ALLOWED_BYTES = 64 * 2**20
"""An array may have at most `MAX_RATIO` times the bytes of its files, or this if that is more. Real ones have a
hundredth of that ratio; a few bytes of zstd could claim any size."""

_CRC_BYTES, _INDEX_ENTRY_BYTES = 4, 16
_PLAIN, _COMPRESSED = ["bytes", "crc32c"], ["bytes", "zstd", "crc32c"]
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class UnsoundChunk(ValueError):
    """Metadata or a chunk that this format does not have, or that is not whole."""


@dataclass(frozen=True)
class ArrayMetadata:
    """A `zarr.json` that this format allows: one file, which is one chunk or, sharded, a grid of inner chunks."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk_shape: tuple[int, ...]
    """Of an inner chunk."""
    grid: tuple[int, ...]
    """Number of inner chunks in each dimension."""
    sharded: bool
    compressed: bool
    file_bytes: int

    @classmethod
    def parse(
        cls, data: bytes, where: str, shape: tuple[int | None, ...], dtypes: Sequence[str], file_bytes: int
    ) -> "ArrayMetadata":
        """What a `zarr.json` declares; `shape` follows from the commit record, with None where that does not say.

        Raises:
            UnsoundChunk: If it is no array of this shape, in one file, with our codecs, or if it would be too large.
            CorruptData: If it is not JSON.
        """
        try:
            layout = _layout_of(parse_json(data, where))
        except (KeyError, TypeError, IndexError, AttributeError):
            layout = None
        if layout is None:
            raise UnsoundChunk(f"{where} describes an array with other chunks or codecs than this format has")
        found, dtype, outer, inner, sharded, compressed = layout
        fits = len(found) == len(shape) and all(a in (None, b) for a, b in zip(shape, found, strict=True))
        if dtype not in dtypes or not fits:
            raise UnsoundChunk(f"{where}: found {dtype} of shape {found}, expected {dtypes[0]} of shape {shape}")
        # One file holds all; a shard of chunks is padded by less than one more inner chunk in each dimension.
        for size, whole, part in zip(found, outer, inner, strict=True):
            if size > whole or whole % part or (part != whole and whole >= max(size, 1) + part):
                raise UnsoundChunk(f"{where}: chunks of {outer} and {inner} are not those of one file of shape {found}")
        grid = tuple(whole // part for whole, part in zip(outer, inner, strict=True))
        metadata = cls(found, np.dtype(dtype).newbyteorder("<"), inner, grid, sharded, compressed, file_bytes)
        wanted, allowed = metadata.num_chunks * metadata.chunk_bytes, max(ALWAYS_ALLOWED_BYTES, MAX_RATIO * file_bytes)
        if wanted > allowed or (0 not in found and metadata.num_chunks > max(1, file_bytes // _INDEX_ENTRY_BYTES)):
            raise UnsoundChunk(
                f"{where} declares {wanted} bytes in {metadata.num_chunks} chunks, {file_bytes} are stored; at most "
                f"{allowed} are decoded, and each chunk has an entry in the index"
            )
        return metadata

    @cached_property
    def chunk_bytes(self) -> int:
        """Bytes of an inner chunk, decoded."""
        return math.prod(self.chunk_shape) * self.dtype.itemsize

    @property
    def num_chunks(self) -> int:
        """Inner chunks."""
        return math.prod(self.grid)

    @property
    def index_bytes(self) -> int:
        """Bytes of the index of inner chunks, its checksum included."""
        return self.num_chunks * _INDEX_ENTRY_BYTES + _CRC_BYTES


def _layout_of(fields: Any) -> tuple[tuple[int, ...], str, tuple[int, ...], tuple[int, ...], bool, bool] | None:
    """Shape, type, outer and inner chunk, sharded, compressed; None for what Zarr has and this format does not."""
    grid, codecs = fields["chunk_grid"], fields["codecs"]
    shape, outer = tuple(fields["shape"]), tuple(grid["configuration"]["chunk_shape"])
    inner, sharded = outer, codecs[0]["name"] == "sharding_indexed"
    if sharded:
        settings = codecs[0]["configuration"]
        if len(codecs) > 1 or settings["index_location"] != "end" or _names(settings["index_codecs"]) != _PLAIN:
            return None
        inner, codecs = tuple(settings["chunk_shape"]), settings["codecs"]
    ours = (
        fields["node_type"] == "array"
        and fields["zarr_format"] == 3
        and grid["name"] == "regular"
        and fields["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "/"}}
        and not fields.get("storage_transformers")
        and _names(codecs) in (_PLAIN, _COMPRESSED)
        and codecs[0].get("configuration", {}).get("endian", "little") == "little"
        and len(shape) == len(outer) == len(inner)
        and all(type(size) is int and size >= 0 for size in shape)
        and all(type(size) is int and size >= 1 for size in (*outer, *inner))
    )
    return (shape, fields["data_type"], outer, inner, sharded, _names(codecs) == _COMPRESSED) if ours else None


def _names(codecs: list[dict[str, Any]]) -> list[str]:
    return [str(codec["name"]) for codec in codecs]


def zstd_frame_bytes(data: np.ndarray[Any, Any], key: str) -> int:
    """Decoded bytes of the one zstd frame in `data`; see RFC 8878, 3.1.1.

    Raises:
        UnsoundChunk: If it is no single frame that says its size; `key` names it.
    """
    head = data[:18].tobytes()
    if head[:4] != _ZSTD_MAGIC or len(head) < 6:
        raise UnsoundChunk(f"{key} holds no zstd frame")
    flags = head[4]
    single_segment = flags >> 5 & 1
    field_bytes = (single_segment, 2, 4, 8)[flags >> 6]
    start = 5 + (1 - single_segment) + (0, 1, 2, 4)[flags & 3]
    if not field_bytes:
        raise UnsoundChunk(f"{key} has a zstd frame that does not say its size")
    size = int.from_bytes(head[start : start + field_bytes], "little") + (256 if field_bytes == 2 else 0)
    position, last = start + field_bytes, False
    while not last:
        block = int.from_bytes(data[position : position + 3].tobytes(), "little")
        last = bool(block & 1)
        position += 3 + (1 if block >> 1 & 3 == 1 else block >> 3)
        if position > len(data):
            raise UnsoundChunk(f"{key} has a zstd frame that is cut off")
    # A second frame would be decoded too.
    if position + (4 if flags >> 2 & 1 else 0) != len(data):
        raise UnsoundChunk(f"{key} holds more than one zstd frame")
    return size
