"""The files of a shard as Zarr may see them: none missing, none that decodes to more than its record allows.

Zarr itself reads a missing chunk as the fill value, and believes what a compressed chunk says of its size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from zarr.abc.store import ByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore as ZarrFolder
from zarr.storage import WrapperStore

from storage.digests import parse_json

MAX_RATIO = 1000
ALWAYS_ALLOWED_BYTES = 64 * 2**20
"""An array may have at most `MAX_RATIO` times the bytes of its files, or this if that is more. Real ones have a
hundredth of that ratio; a few bytes of zstd could claim any size."""

_CRC_BYTES, _INDEX_ENTRY_BYTES = 4, 16
_PLAIN, _COMPRESSED = ["bytes", "crc32c"], ["bytes", "zstd", "crc32c"]
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True)
class Declared:
    """What the metadata of one array says, once it was found to be allowed."""

    frame_bytes: int
    """Decoded bytes of a chunk; of an inner one, if the file is a shard of chunks."""
    compressed: bool
    num_inner: int | None
    """Inner chunks of the array's one file; None if the file is one chunk."""


class UnsoundChunk(ValueError):
    """Metadata or a chunk that this format does not have, or that is not whole."""


def declared(
    metadata: bytes, where: str, shape: tuple[int | None, ...], dtypes: Sequence[str], num_bytes: int
) -> Declared:
    """What a `zarr.json` declares, before anything is decoded by it.

    `shape` follows from the commit record, with None where that does not say; `num_bytes` are those of the array's
    chunk files.

    Raises:
        UnsoundChunk: If it is no array of this shape, in one file, with our codecs, or if it would be too large.
        CorruptData: If it is not JSON.
    """
    try:
        layout = _layout_of(parse_json(metadata, where))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UnsoundChunk(f"{where} is no metadata of an array ({error!r})") from error
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
    num_values = math.prod(outer)
    wanted, num_inner = num_values * np.dtype(dtype).itemsize, num_values // math.prod(inner)
    allowed = max(ALWAYS_ALLOWED_BYTES, MAX_RATIO * num_bytes)
    if wanted > allowed or (0 not in found and num_inner > max(1, num_bytes // _INDEX_ENTRY_BYTES)):
        raise UnsoundChunk(
            f"{where} declares {wanted} bytes in {num_inner} chunks, {num_bytes} are stored; at most {allowed} are "
            "decoded, and each chunk has an entry in the index"
        )
    return Declared(wanted // num_inner, compressed, num_inner if sharded else None)


_Sizes = tuple[int, ...]


def _layout_of(fields: Any) -> tuple[_Sizes, str, _Sizes, _Sizes, bool, bool] | None:
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
        and len(shape) == len(outer) == len(inner)
        and all(type(size) is int and size >= 0 for size in shape)
        and all(type(size) is int and size >= 1 for size in (*outer, *inner))
    )
    return (shape, fields["data_type"], outer, inner, sharded, _names(codecs) == _COMPRESSED) if ours else None


def _names(codecs: list[dict[str, Any]]) -> list[str]:
    return [str(codec["name"]) for codec in codecs]


class CheckedFolder(WrapperStore[ZarrFolder]):
    """A shard's folder in which a missing, shortened or oversized chunk is an error."""

    def __init__(self, folder: Path, arrays: Mapping[str, Declared]) -> None:
        super().__init__(ZarrFolder(folder, read_only=True))
        self._declared = arrays

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """What is stored under `key`, once it is known to be whole."""
        found = await super().get(key, prototype, byte_range)
        name, _, chunk = key.partition("/")
        if not chunk.startswith("c/"):
            return found
        if found is None:
            raise FileNotFoundError(f"chunk {key} is missing")
        _check(found.as_numpy_array().view(np.uint8), self._declared[name], byte_range, key)
        return found


def _check(data: np.ndarray[Any, Any], array: Declared, asked: ByteRequest | None, key: str) -> None:
    """What was read of a chunk file: an inner chunk, the index of them, or all of it."""
    if isinstance(asked, RangeByteRequest):
        if len(data) != (expected := asked.end - asked.start):
            raise UnsoundChunk(f"{key} has {len(data)} bytes at {asked.start}, its index says {expected}")
        _check_frame(data, array, key)
    elif array.num_inner is None:
        _check_frame(data, array, key)
    else:
        index_bytes = array.num_inner * _INDEX_ENTRY_BYTES + _CRC_BYTES
        if len(data) < index_bytes:
            raise UnsoundChunk(f"{key} has {len(data)} bytes, the index of its chunks alone {index_bytes}")
        spans = np.frombuffer(data[-index_bytes:-_CRC_BYTES].tobytes(), dtype="<u8").reshape(-1, 2)
        if bool((spans == np.iinfo(np.uint64).max).any()):
            raise UnsoundChunk(f"{key} leaves out one of its {array.num_inner} chunks")
        if isinstance(asked, SuffixByteRequest):
            return
        for start, num_bytes in spans.tolist():
            if start + num_bytes > len(data) - index_bytes:
                raise UnsoundChunk(f"{key} has {len(data)} bytes, a chunk of its index ends at {start + num_bytes}")
            _check_frame(data[start : start + num_bytes], array, key)


def _check_frame(data: np.ndarray[Any, Any], array: Declared, key: str) -> None:
    stored = len(data) - _CRC_BYTES
    found = _zstd_frame(data[:stored], key) if array.compressed else stored
    if found != array.frame_bytes:
        raise UnsoundChunk(f"{key} has a chunk that decodes to {found} bytes, expected {array.frame_bytes}")


def _zstd_frame(data: np.ndarray[Any, Any], key: str) -> int:
    """Decoded bytes of the one zstd frame in `data`; see RFC 8878, 3.1.1."""
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
