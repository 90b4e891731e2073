"""Writes the arrays of a shard as one Zarr group."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.sync import sync
from zarr.storage import LocalStore as ZarrFolder

from storage.targets.layout import ALL_ARRAYS, ARRAYS, ArraySpec

ROWS_A_CHUNK = 256
"""Answer rows decoded at least when one sample is read: 56 kB of records at the default codec."""

_ENDING = threading.Lock()


def write_group(folder: Path, arrays: dict[str, np.ndarray[Any, Any]], attributes: dict[str, Any]) -> None:
    """Write a group of all arrays to an empty folder; after an OSError nothing is being written any more."""
    specs = [spec for spec in ALL_ARRAYS if spec.name in arrays]
    assert len(specs) == len(arrays)
    assert {*ARRAYS} <= {*specs}
    try:
        _write_arrays(folder, specs, arrays, attributes)
    except OSError:
        # Where one write fails, Zarr raises while its others go on: they would make a removed folder anew.
        # One thread at a time: two that waited for each other's writes would wait for ever.
        with _ENDING:
            sync(_others_end())
        raise


async def _others_end() -> None:
    await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)


def _write_arrays(
    folder: Path, specs: list[ArraySpec], arrays: dict[str, np.ndarray[Any, Any]], attributes: dict[str, Any]
) -> None:
    """Each in one call: row by row a sharded one would be written again and again."""
    group = zarr.create_group(ZarrFolder(folder), attributes=attributes)
    for spec in specs:
        data = arrays[spec.name]
        chunks = _inner_chunks(spec, arrays)
        # The smallest multiple of the inner chunk that holds the array: one file.
        whole = tuple(max(1, -(-size // chunk)) * chunk for size, chunk in zip(data.shape, chunks, strict=True))
        array = group.create_array(
            spec.name,
            shape=data.shape,
            dtype=data.dtype,
            chunks=chunks,
            shards=whole if spec.sharded else None,
            compressors=(ZstdCodec(level=1), Crc32cCodec()),
            filters=None,
            fill_value=0,
            # Without this a chunk of zeros is no file, and so cannot be told from a lost one.
            config={"write_empty_chunks": True},
        )
        if data.size:
            array[...] = data


def _inner_chunks(spec: ArraySpec, arrays: dict[str, np.ndarray[Any, Any]]) -> tuple[int, ...]:
    """Sharded: one layer of one map, all of one map, all layers of one answer, a block of answer rows.

    Otherwise the whole array.
    """
    shape = arrays[spec.name].shape
    if spec.name == "map_codes":
        return (1, _largest_step(arrays["map_code_offsets"]))
    if spec.name == "map_corners":
        return (max(1, shape[0]), _largest_step(arrays["map_corner_offsets"]))
    if spec.name in ("window_shifts", "answer_attention"):
        return (max(1, shape[0]), max(1, int(arrays["map_num_tokens"].max(initial=0))))
    if spec.name == "window_flips":
        return (_largest_step(arrays["window_flip_offsets"]),)
    if spec.sharded:
        return (max(1, min(ROWS_A_CHUNK, shape[0])), max(1, shape[1]))
    return tuple(max(1, size) for size in shape)


def _largest_step(offsets: np.ndarray[Any, Any]) -> int:
    """Maps of a shard mostly have one size; of several the largest: a map spans two chunks at most."""
    return max(1, int(np.diff(offsets).max(initial=0)))
