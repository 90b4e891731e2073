"""Writing one target shard: checked, staged on local disk, measured, moved into place and committed.

Letters as in `layout.py`.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from storage.codecs.sinks import packed_mask_bytes
from storage.errors import CorruptData
from storage.manifest import Manifest
from storage.records import MapTargets, SampleTargets, SkippedSample
from storage.stores import Store
from storage.targets.commits import SHARDS, CommitRecord, measure_files, publish
from storage.targets.layout import write_group

_Array = np.ndarray[Any, Any]


def write_shard(
    store: Store,
    index: int,
    manifest: Manifest,
    sample_shard_name: str,
    samples: list[SampleTargets],
    maps: list[MapTargets],
    skipped: list[SkippedSample],
) -> CommitRecord:
    """Write and commit one shard; the same arguments give the same bytes, on any machine and after any kill.

    Needs about three times the shard's codes in memory (the arguments, one array of them, its compressed
    chunks).

    Args:
        store: The target store; its manifest exists.
        index: The shard's number.
        manifest: What the arrays are checked against.
        sample_shard_name: Name of the tar.
        samples: In the tar's order.
        maps: What the samples' `map_row` counts into; each is used by a sample.
        skipped: The tar's other samples.

    Returns:
        The record that counts, which is another extractor's if that one committed this shard first.

    Raises:
        ValueError: If arrays disagree with each other or with the manifest, or hold NaN.
    """
    _check_samples(manifest, samples, maps, skipped)
    for row, entry in enumerate(maps):
        _check_map(manifest, row, entry)
    staged = store.staging(f"{SHARDS}/{index:06d}.zarr")
    try:
        sizes = [maps[sample.map_row].num_tokens for sample in samples if sample.map_row is not None]
        counts = {
            "num_samples": len(samples),
            "num_tokens": sum(len(sample.token_ids) for sample in samples),
            "num_answer_rows": sum(len(sample.logits) for sample in samples),
            "num_maps": len(maps),
            "num_map_references": len(sizes),
        }
        arrays = {**_sample_arrays(manifest, samples), **_map_arrays(manifest, maps)}
        attributes = {"shard": index, "sample_shard": sample_shard_name, **counts}
        write_group(staged, arrays, {"compodistill": attributes})
        files = measure_files(staged)
        _check_whole(files, arrays)
        record = CommitRecord.build(
            shard=index,
            sample_shard=sample_shard_name,
            **counts,
            num_referenced_tokens=sum(sizes),
            num_referenced_squares=sum(size * size for size in sizes),
            files=files,
            skipped=tuple(skipped),
            fingerprint=manifest.fingerprint.digest,
        )
        return publish(store, Path(staged), record)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _check_whole(files: Mapping[str, object], arrays: Mapping[str, _Array]) -> None:
    """Another driver's clean-up may have removed the staging folder while it was written."""
    with_data = {path.split("/")[0] for path in files if "/c/" in path}
    lost = [
        name for name, a in arrays.items() if f"{name}/zarr.json" not in files or (a.size and name not in with_data)
    ]
    if lost or "zarr.json" not in files:
        raise CorruptData(
            f"the staged shard lost {lost or 'its group'} while it was written, as when a second extraction starts on "
            "the same store and cleans up; run one driver at a time"
        )


def _sample_arrays(manifest: Manifest, samples: Sequence[SampleTargets]) -> dict[str, _Array]:
    keys = [sample.key.encode() for sample in samples]
    logits = [sample.logits for sample in samples]
    return {
        "sample_keys": np.frombuffer(b"".join(keys), dtype=np.uint8),
        "sample_key_offsets": _offsets([len(key) for key in keys]),
        "token_ids": _joined([sample.token_ids for sample in samples], (0,), torch.int32),
        "answer_mask": _joined([sample.answer_mask for sample in samples], (0,), torch.bool),
        "token_offsets": _offsets([len(sample.token_ids) for sample in samples]),
        "map_rows": np.array([-1 if sample.map_row is None else sample.map_row for sample in samples], dtype=np.int64),
        "logit_ids": _joined([rows.ids_RK for rows in logits], (0, manifest.num_kept), torch.int32),
        "logit_logprobs": _joined([rows.logprobs_RK for rows in logits], (0, manifest.num_kept), torch.float16),
        "logit_tail_logmass": _joined([rows.tail_logmass_R for rows in logits], (0,), torch.float32),
        "logit_log_partition": _joined([rows.log_partition_R for rows in logits], (0,), torch.float32),
        "logit_offsets": _offsets([len(rows) for rows in logits]),
    }


def _map_arrays(manifest: Manifest, maps: Sequence[MapTargets]) -> dict[str, _Array]:
    fingerprint = manifest.fingerprint
    num_layers, num_windows = len(fingerprint.layers), len(fingerprint.windows)
    codes = [entry.codes_LE for entry in maps]
    masks = [entry.keep_masks for entry in maps]
    caps = [entry.caps_L[:, None] for entry in maps]
    return {
        "map_num_tokens": np.array([entry.num_tokens for entry in maps], dtype=np.int32),
        "map_caps": _joined(caps, (num_layers, 0), torch.float32, dim=1),
        "map_codes": _joined(codes, (num_layers, 0), fingerprint.map_codec.dtype, dim=1),
        "map_code_offsets": _offsets([code.shape[1] for code in codes]),
        "keep_masks": _joined(masks, (num_windows, 0), torch.uint8, dim=1),
        "keep_mask_offsets": _offsets([mask.shape[1] for mask in masks]),
    }


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
    manifest: Manifest,
    samples: Sequence[SampleTargets],
    maps: Sequence[MapTargets],
    skipped: Sequence[SkippedSample],
) -> None:
    keys = [sample.key for sample in samples] + [sample.key for sample in skipped]
    if len(set(keys)) < len(keys):
        raise ValueError(f"sample key {max(keys, key=keys.count)!r} comes twice among samples and skipped ones")
    used = {sample.map_row for sample in samples} - {None}
    if used != set(range(len(maps))):
        raise ValueError(f"samples use map rows {sorted(map(str, used))[:5]}..., expected each of {len(maps)} maps")
    for sample in samples:
        mask, rows = sample.answer_mask, sample.logits
        if mask.shape != sample.token_ids.shape or mask.ndim != 1:
            raise ValueError(f"sample {sample.key}: mask {tuple(mask.shape)}, ids {tuple(sample.token_ids.shape)}")
        num_rows = int(mask.sum())
        shape = (num_rows, manifest.num_kept)
        if not (tuple(rows.ids_RK.shape) == tuple(rows.logprobs_RK.shape) == shape):
            raise ValueError(f"sample {sample.key}: logits {tuple(rows.ids_RK.shape)}, expected {shape} by its mask")
        if not (tuple(rows.tail_logmass_R.shape) == tuple(rows.log_partition_R.shape) == (num_rows,)):
            raise ValueError(f"sample {sample.key}: tail or partition is not one value for each of {num_rows} rows")
        if len(mask) and bool(mask[0]):
            raise ValueError(f"sample {sample.key}: its first token is an answer token, which nothing predicts")
        if bool(rows.logprobs_RK.isnan().any() | rows.tail_logmass_R.isnan().any()) or not bool(
            rows.log_partition_R.isfinite().all()
        ):
            raise ValueError(f"sample {sample.key}: logits hold NaN, or a partition that is not finite")


def _check_map(manifest: Manifest, row: int, entry: MapTargets) -> None:
    fingerprint = manifest.fingerprint
    codec = fingerprint.map_codec
    num_layers, num_windows = len(fingerprint.layers), len(fingerprint.windows)
    expected = (
        (num_layers, codec.num_codes(entry.num_tokens)),
        (num_layers,),
        (num_windows, packed_mask_bytes(entry.num_tokens, codec.causal)),
    )
    found = (tuple(entry.codes_LE.shape), tuple(entry.caps_L.shape), tuple(entry.keep_masks.shape))
    if found != expected or entry.num_tokens < 1:
        raise ValueError(
            f"map {row} of {entry.num_tokens} tokens has codes, caps, masks of {found}, expected {expected}"
        )
    if not bool(torch.isfinite(entry.caps_L).all()) or (
        entry.codes_LE.is_floating_point() and not bool(torch.isfinite(entry.codes_LE).all())
    ):
        raise ValueError(f"map {row} holds NaN or infinite values")
