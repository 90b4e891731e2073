"""What each map codec costs on the measured samples: bytes of an array's unit, seconds of coding and of writing."""

import math
import statistics
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch

from stages.estimate.extrapolate import UNIT_OF_ARRAY, CodecCost, predicted
from stages.estimate.sampling import Counts, SampledBlock
from stages.teacher.observe import ShardObservations
from stages.teacher.teacher import Teacher
from storage.codecs.config import MapCodecName, num_entries
from storage.progress import Progress
from storage.samples.index import SampleIndex
from storage.stores import open_store
from storage.targets.commits import CommitRecord
from storage.targets.layout import ARRAYS
from storage.targets.manifest import Manifest
from storage.targets.writer import write_shard

CODECS: tuple[MapCodecName, ...] = get_args(MapCodecName)


def measure_codecs(
    teacher: Teacher,
    seen: ShardObservations,
    blocks: Sequence[SampledBlock],
    index: SampleIndex,
    chosen: MapCodecName,
    folder: Path,
    progress: Progress,
) -> dict[MapCodecName, CodecCost]:
    """Codes the 16-bit maps that the teacher saw with every codec, and writes them as shards below `folder`.

    How blocks differ, and what a shard costs to write, is measured with the chosen codec alone.
    """
    task = progress.task("code and write", len(CODECS), unit="codecs")
    causal = teacher.identity.codec.causal
    costs: dict[MapCodecName, CodecCost] = {}
    for name in (chosen, *(name for name in CODECS if name != chosen)):
        identity = replace(teacher.identity, codec=teacher.identity.codec.model_copy(update={"name": name}))
        manifest = identity.manifest(index.digest, len(index.shards))
        started = time.perf_counter()
        recoded = _recoded(teacher, seen, manifest)
        coding_seconds = (time.perf_counter() - started) / max(len(recoded.maps), 1)
        if name == chosen:
            parts = [_part(recoded, {sample.key for sample in block.kept}) for block in blocks]
            parts = [part for part in parts if part.samples]
            written = [_write(folder / name / str(number), manifest, part) for number, part in enumerate(parts)]
        record, seconds = _write(folder / name / "whole", manifest, recoded)
        data, metadata_bytes = _bytes_by_array(record)
        units = _units(recoded, causal=causal)
        rates = {array: size / max(units[UNIT_OF_ARRAY[array]], 1) for array, size in data.items()}
        if name == chosen:
            part_bytes = [_bytes_by_array(part_record)[0].total() for part_record, _ in written]
            # A block is little more than what every shard costs, whatever is in it.
            fixed_seconds = statistics.median(part_seconds for _, part_seconds in written)
            more_bytes = data.total() - statistics.median(part_bytes)
            per_byte = max(0.0, (seconds - fixed_seconds) / more_bytes) if more_bytes > 0 else 0.0
            expected = [predicted(rates, _units(part, causal=causal)) for part in parts]
            spread = _standard_error([size / each for size, each in zip(part_bytes, expected, strict=True)])
        costs[name] = CodecCost(
            rates=rates,
            metadata_bytes=metadata_bytes,
            num_files=len(record.files),
            commit_bytes=len(record.to_bytes()),
            coding_seconds=coding_seconds,
            spread=spread,
            fixed_seconds=fixed_seconds,
            seconds_per_byte=per_byte,
        )
        task.advance()
    return {name: costs[name] for name in CODECS}


def _standard_error(values: Sequence[float]) -> float:
    """Of the mean, as a share of it; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    return statistics.stdev(values) / statistics.mean(values) / math.sqrt(len(values))


def _recoded(teacher: Teacher, seen: ShardObservations, manifest: Manifest) -> ShardObservations:
    """The 16-bit maps in another code, made on the teacher's device."""
    stored, device = teacher.identity.map_codec, teacher.model.device
    other = replace(stored, config=manifest.fingerprint.map_codec)
    maps = [other.encode(stored.decode(entry.to(device))).to(torch.device("cpu")) for entry in seen.maps]
    return ShardObservations(seen.samples, maps)


def _part(whole: ShardObservations, keys: Collection[str]) -> ShardObservations:
    """The samples of these keys, their maps numbered from 0."""
    samples = [sample for sample in whole.samples if sample.key in keys]
    rows = list(dict.fromkeys(sample.map_row for sample in samples if sample.map_row is not None))
    numbers: dict[int | None, int | None] = {None: None} | {row: number for number, row in enumerate(rows)}
    return ShardObservations(
        [replace(sample, map_row=numbers[sample.map_row]) for sample in samples], [whole.maps[row] for row in rows]
    )


def _write(folder: Path, manifest: Manifest, seen: ShardObservations) -> tuple[CommitRecord, float]:
    """Writes a shard; its commit record, and the seconds it took."""
    started = time.perf_counter()
    record = write_shard(open_store(folder), 0, manifest, "samples-000000.tar", seen.samples, seen.maps, [])
    return record, time.perf_counter() - started


def _bytes_by_array(record: CommitRecord) -> tuple[Counter[str], int]:
    """Bytes of data by array, and bytes of all metadata."""
    data, metadata = Counter({spec.name: 0 for spec in ARRAYS}), 0
    for path, (size, _) in record.files.items():
        name, _, below = path.partition("/")
        if below.startswith("c/") or below == "c":
            data[name] += size
        else:
            metadata += size
    return data, metadata


def _units(seen: ShardObservations, *, causal: bool) -> Counts:
    return {
        "samples": len(seen.samples),
        "tokens": sum(len(sample.token_ids) for sample in seen.samples),
        "answer_rows": sum(len(sample.logits_RQ) for sample in seen.samples),
        "maps": len(seen.maps),
        "image_tokens": sum(entry.num_tokens for entry in seen.maps),
        "map_entries": sum(num_entries(entry.num_tokens, causal) for entry in seen.maps),
    }
