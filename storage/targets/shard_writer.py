"""Writing one target shard: checked, staged on local disk, measured, moved into place and committed."""

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from storage.codecs import answer_attention
from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.codecs.attention_maps import EncodedMaps, MapCodec
from storage.codecs.codec_settings import num_entries
from storage.codecs.map_entries import code_dtype
from storage.codecs.windows import EncodedWindows
from storage.errors import CorruptData, disk_errors_named
from storage.stores import Store
from storage.stores.base import measure_files
from storage.targets.array_writer import write_group
from storage.targets.commits import SHARDS, CommitRecord, SkippedSample, publish
from storage.targets.manifest import Manifest
from storage.targets.sample_targets import SampleTargets

_Array = np.ndarray[Any, Any]


def write_shard(
    store: Store,
    index: int,
    manifest: Manifest,
    sample_shard_name: str,
    samples: list[SampleTargets],
    maps: list[EncodedMaps],
    skipped: list[SkippedSample],
) -> CommitRecord:
    """Write and commit one shard; the same arguments give the same bytes, on any machine and after any kill.

    Needs about three times the shard's codes in memory (the arguments, one array of them, its compressed chunks).

    Samples are in the tar's order, and their `map_row` counts into `maps`, each of which is used. `skipped` are the
    tar's other samples. The store has a manifest already.

    Returns:
        The record that counts, which is another extractor's if that one committed this shard first.

    Raises:
        ValueError: If arrays disagree with each other or with the manifest, or hold NaN.
    """
    _check_samples(manifest, samples, maps, skipped)
    for sample in samples:
        _check_answers(manifest, sample, maps)
    for row, entry in enumerate(maps):
        _check_map(manifest, row, entry)
    staged = store.staging(f"{SHARDS}/{index:06d}.zarr")
    try:
        sizes = [maps[sample.map_row].num_tokens for sample in samples if sample.map_row is not None]
        cuts = [sample.num_cut_answer_tokens for sample in samples if sample.num_cut_answer_tokens]
        counts = {
            "num_samples": len(samples),
            "num_tokens": sum(len(sample.token_ids) for sample in samples),
            "num_answer_rows": sum(len(sample.logits_RQ) for sample in samples),
            "num_maps": len(maps),
            "num_map_references": len(sizes),
        }
        arrays = {**_sample_arrays(manifest, samples), **_map_arrays(manifest, maps)}
        attributes = {"shard": index, "sample_shard": sample_shard_name, **counts}
        with disk_errors_named(staged):
            write_group(staged, arrays, {"compodistill": attributes})
            files = measure_files(staged)
        _check_whole(files, arrays)
        record = CommitRecord.build(
            format_version=manifest.format_version,
            shard=index,
            sample_shard=sample_shard_name,
            **counts,
            num_cut_samples=len(cuts),
            num_cut_answer_tokens=sum(cuts),
            num_map_tokens=sum(entry.num_tokens for entry in maps),
            num_map_squares=sum(entry.num_tokens**2 for entry in maps),
            num_turned=sum(sample.is_turned for sample in samples),
            num_referenced_tokens=sum(sizes),
            num_referenced_squares=sum(size * size for size in sizes),
            files=files,
            skipped=tuple(skipped),
            manifest=manifest.digest,
        )
        return publish(store, staged, record)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _check_whole(files: Mapping[str, object], arrays: Mapping[str, _Array]) -> None:
    """Somebody may have removed files of the staging folder while it was written."""
    with_data = {path.partition("/c/")[0] for path in files}
    lost = [
        name for name, a in arrays.items() if f"{name}/zarr.json" not in files or (a.size and name not in with_data)
    ]
    if lost or "zarr.json" not in files:
        raise CorruptData(
            f"the staged shard lost {lost or 'its group'} while it was written: something else removed files of the "
            "store's `.partial` folders; leave them to `cdp extract-teacher`, which removes those of dead processes"
        )


def _sample_arrays(manifest: Manifest, samples: Sequence[SampleTargets]) -> dict[str, _Array]:
    fingerprint = manifest.fingerprint
    keys = [sample.key.encode() for sample in samples]
    records = [sample.logits_RQ for sample in samples]
    answers: dict[str, _Array] = {}
    if fingerprint.answer_attention:
        nothing = torch.zeros(len(fingerprint.layers), 0, dtype=torch.float16)
        given = [sample.answer_attention_LaN for sample in samples]
        values = [nothing if one_LaN is None else one_LaN.flatten(1) for one_LaN in given]
        answers = {
            "answer_attention": _joined(values, tuple(nothing.shape), torch.float16, dim=1),
            "answer_attention_offsets": _offsets([one.shape[1] for one in values]),
        }
    return {
        **answers,
        "sample_keys": np.frombuffer(b"".join(keys), dtype=np.uint8),
        "sample_key_offsets": _offsets([len(key) for key in keys]),
        "token_ids": _joined([sample.token_ids for sample in samples], (0,), torch.int32),
        "answer_mask": _joined([sample.answer_mask for sample in samples], (0,), torch.bool),
        "token_offsets": _offsets([len(sample.token_ids) for sample in samples]),
        "cut_answer_tokens": np.array([sample.num_cut_answer_tokens for sample in samples], dtype=np.int32),
        "map_rows": np.array([-1 if sample.map_row is None else sample.map_row for sample in samples], dtype=np.int64),
        "sample_turned": np.array([sample.is_turned for sample in samples], dtype=np.bool_),
        "logit_records": _joined(records, (0, fingerprint.logit_codec.row_bytes), torch.uint8),
        "logit_offsets": _offsets([len(rows) for rows in records]),
    }


def _map_arrays(manifest: Manifest, maps: Sequence[EncodedMaps]) -> dict[str, _Array]:
    fingerprint = manifest.fingerprint
    num_layers, num_windows = len(fingerprint.layers), len(fingerprint.windows)
    windows = [_windows(row, entry) for row, entry in enumerate(maps)]

    def beside(parts: list[Tensor], num_rows: int, dtype: torch.dtype) -> _Array:
        return _joined(parts, (num_rows, 0), dtype, dim=1)

    def columns(parts: list[Tensor], num_rows: int) -> _Array:
        return beside([part[:, None] for part in parts], num_rows, torch.float32)

    cells: dict[str, _Array] = {}
    if fingerprint.map_pooling > 1:
        each = [entry.cells_X for entry in maps if entry.cells_X is not None]
        cells = {
            "map_cells": _joined(each, (0,), torch.int32),
            "map_cell_offsets": _offsets([len(cells_X) for cells_X in each]),
        }
    return {
        **cells,
        "map_num_tokens": np.array([entry.num_tokens for entry in maps], dtype=np.int32),
        "map_caps": columns([entry.caps_L for entry in maps], num_layers),
        "map_means": columns([each.means_L for each in windows], num_layers),
        "map_covariances": columns([each.covariances_P for each in windows], num_entries(num_layers, causal=True)),
        "map_codes": beside([entry.codes_LC for entry in maps], num_layers, code_dtype(fingerprint.map_codec)),
        "map_code_offsets": _offsets([entry.codes_LC.shape[1] for entry in maps]),
        "map_corners": beside([each.tail_blocks_LY for each in windows], num_layers, torch.float16),
        "map_corner_offsets": _offsets([each.tail_blocks_LY.shape[1] for each in windows]),
        "window_thresholds": columns([each.thresholds_W for each in windows], num_windows),
        "window_shifts": beside([each.shifts_WN for each in windows], num_windows, torch.float16),
        "window_flips": _joined([each.flips_G for each in windows], (0,), torch.uint8),
        "window_flip_offsets": _offsets([len(each.flips_G) for each in windows]),
    }


def _windows(row: int, entry: EncodedMaps) -> EncodedWindows:
    if entry.windows is None:
        raise ValueError(f"map {row} was read without its windows, and cannot be written again; read all its layers")
    return entry.windows


def _offsets(sizes: list[int]) -> _Array:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.array(sizes, dtype=np.int64))])


def _joined(parts: list[Tensor], empty: tuple[int, ...], dtype: torch.dtype, dim: int = 0) -> _Array:
    tensors = [torch.zeros(empty, dtype=dtype), *(part.detach().cpu() for part in parts)]
    for tensor in tensors:
        if tensor.dtype != dtype:
            raise ValueError(f"a part is {tensor.dtype}, expected {dtype}")
    joined: _Array = torch.cat(tensors, dim=dim).numpy()
    return joined


def _check_samples(
    manifest: Manifest, samples: Sequence[SampleTargets], maps: Sequence[EncodedMaps], skipped: Sequence[SkippedSample]
) -> None:
    keys = [sample.key for sample in samples] + [sample.key for sample in skipped]
    if len(set(keys)) < len(keys):
        raise ValueError(f"sample key {max(keys, key=keys.count)!r} comes twice among samples and skipped ones")
    used = {sample.map_row for sample in samples} - {None}
    if used != set(range(len(maps))):
        raise ValueError(f"samples use map rows {sorted(map(str, used))[:5]}..., expected each of {len(maps)} maps")
    codec = manifest.fingerprint.logit_codec
    for sample in samples:
        mask = sample.answer_mask
        if mask.shape != sample.token_ids.shape or mask.ndim != 1:
            raise ValueError(f"sample {sample.key}: mask {tuple(mask.shape)}, ids {tuple(sample.token_ids.shape)}")
        if len(mask) > manifest.fingerprint.max_length:
            raise ValueError(f"sample {sample.key}: {len(mask)} tokens, max_length {manifest.fingerprint.max_length}")
        found, expected = tuple(sample.logits_RQ.shape), (int(mask.sum()), codec.row_bytes)
        if found != expected:
            raise ValueError(f"sample {sample.key}: logit records {found}, expected {expected} by mask and codec")
        if len(mask) and bool(mask[0]):
            raise ValueError(f"sample {sample.key}: its first token is an answer token, which nothing predicts")
        if bad := AnswerLogitsCodec(codec).fault(sample.logits_RQ):
            raise ValueError(f"sample {sample.key}: logit records hold {bad}")


def _check_answers(manifest: Manifest, sample: SampleTargets, maps: Sequence[EncodedMaps]) -> None:
    found_LaN, fingerprint = sample.answer_attention_LaN, manifest.fingerprint
    expected = None
    if fingerprint.answer_attention and sample.map_row is not None:
        num_answers = answer_attention.num_answers(sample.answer_mask)
        expected = len(fingerprint.layers), num_answers, maps[sample.map_row].num_tokens
    found = None if found_LaN is None else tuple(found_LaN.shape)
    if found != expected:
        raise ValueError(
            f"sample {sample.key}: answer attention {found}, expected {expected} by manifest, mask and map"
        )
    if found_LaN is not None and (bad := answer_attention.fault(found_LaN)):
        raise ValueError(f"sample {sample.key}: answer attention holds {bad}")


def _check_map(manifest: Manifest, row: int, entry: EncodedMaps) -> None:
    fingerprint = manifest.fingerprint
    _windows(row, entry)
    if len(entry.caps_L) != len(fingerprint.layers):
        raise ValueError(f"map {row} is of {len(entry.caps_L)} layers, expected {len(fingerprint.layers)}")
    if (entry.cells_X is not None) != (fingerprint.map_pooling > 1):
        has = "no cells" if entry.cells_X is None else "cells"
        raise ValueError(f"map {row} has {has}, but map_pooling is {fingerprint.map_pooling}")
    try:
        MapCodec.of_layers(fingerprint.map_codec, fingerprint.layers, fingerprint.windows).check(entry)
    except ValueError as error:
        raise ValueError(f"map {row} of {entry.num_tokens} tokens: {error}") from error
