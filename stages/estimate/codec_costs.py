"""What each map codec costs on the measured samples: bytes of an array's unit, seconds of coding and of writing."""

import math
import statistics
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch

from stages.estimate.sampling import Counts
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

_UNIT_OF_LETTER = {
    "S": "samples",
    "U": "samples",
    "T": "tokens",
    "R": "answer_rows",
    "M": "maps",
    "N": "image_tokens",
    "C": "map_entries",
    "Y": "map_entries",
    "G": "map_entries",
}
UNIT_OF_ARRAY = {
    spec.name: next(_UNIT_OF_LETTER[letter] for letter in spec.letters if letter in _UNIT_OF_LETTER) for spec in ARRAYS
}
"""What an array's bytes grow with: its one dimension that is not the same in every shard."""


@dataclass(frozen=True)
class CodecCost:
    """The measured samples as one codec stores them."""

    rates: Mapping[str, float]
    """Array -> bytes of one of its unit."""
    metadata_bytes: int
    """Of a shard, whatever is in it."""
    commit_bytes: int
    num_files: int
    coding_seconds: float
    """For each map."""
    spread: float = 0.0
    """Standard error of the rates over the blocks, as a share of them."""
    fixed_seconds: float = 0.0
    """Writing a shard of nothing."""
    seconds_per_byte: float = 0.0


def predicted(rates: Mapping[str, float], units: Counts) -> float:
    """Bytes of so many units."""
    return sum(rate * units[UNIT_OF_ARRAY[array]] for array, rate in rates.items())


def measure_codecs(
    teacher: Teacher,
    seen: ShardObservations,
    blocks: Sequence[Collection[str]],
    index: SampleIndex,
    chosen: MapCodecName,
    folder: Path,
    progress: Progress,
) -> dict[MapCodecName, CodecCost]:
    """Codes and writes what the teacher saw with every codec.

    How blocks differ, and what a shard costs to write, is measured with the chosen codec alone.

    Args:
        teacher: codes maps on its device.
        seen: the measured samples, their maps in 16 bits.
        blocks: keys of the samples of each block.
        index: of the whole sample set.
        chosen: the codec of the settings.
        folder: where shards are written.
        progress: where the codecs done are shown.
    """
    task = progress.task("code and write", len(CODECS), unit="codecs")
    costs: dict[MapCodecName, CodecCost] = {}
    for name in (chosen, *(name for name in CODECS if name != chosen)):
        identity = replace(teacher.identity, codec=teacher.identity.codec.model_copy(update={"name": name}))
        manifest = identity.manifest(index.digest, len(index.shards))
        started = time.perf_counter()
        recoded = _recoded(teacher, seen, manifest)
        coding_seconds = (time.perf_counter() - started) / max(len(recoded.maps), 1)
        parts = [part for keys in blocks if (part := _part(recoded, keys)).samples] if name == chosen else []
        written = [_write(folder / name / str(number), manifest, part) for number, part in enumerate(parts)]
        record, seconds = _write(folder / name / "whole", manifest, recoded)
        data, metadata_bytes = _bytes_by_array(record)
        units = _units(recoded, causal=identity.codec.causal)
        costs[name] = CodecCost(
            rates={array: size / max(units[UNIT_OF_ARRAY[array]], 1) for array, size in data.items()},
            metadata_bytes=metadata_bytes,
            commit_bytes=len(record.to_bytes()),
            num_files=len(record.files),
            coding_seconds=coding_seconds,
        )
        if name == chosen:
            part_bytes = [_bytes_by_array(part_record)[0].total() for part_record, _ in written]
            # A block is little more than what every shard costs, whatever is in it.
            fixed_seconds = statistics.median(part_seconds for _, part_seconds in written)
            more_bytes = data.total() - statistics.median(part_bytes)
            per_byte = max(0.0, (seconds - fixed_seconds) / more_bytes) if more_bytes > 0 else 0.0
            expected = [predicted(costs[name].rates, _units(part, causal=identity.codec.causal)) for part in parts]
            spread = _standard_error([size / each for size, each in zip(part_bytes, expected, strict=True)])
        costs[name] = replace(costs[name], spread=spread, fixed_seconds=fixed_seconds, seconds_per_byte=per_byte)
        task.advance()
    return {name: costs[name] for name in CODECS}


def _standard_error(values: Sequence[float]) -> float:
    """Of the mean, as a share of it; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    return statistics.stdev(values) / statistics.mean(values) / math.sqrt(len(values))


def _recoded(teacher: Teacher, seen: ShardObservations, manifest: Manifest) -> ShardObservations:
    """The 16-bit maps in another code, made on the teacher's device."""
    identity, device, cpu = teacher.identity, teacher.model.device, torch.device("cpu")
    stored = identity.map_codec
    other = replace(stored, config=manifest.fingerprint.map_codec)
    maps = [other.encode(stored.decode(entry.to(device))).to(cpu) for entry in seen.maps]
    return ShardObservations(seen.samples, maps)


def _part(whole: ShardObservations, keys: Collection[str]) -> ShardObservations:
    """The samples of these keys, their maps numbered from 0."""
    samples = [sample for sample in whole.samples if sample.key in keys]
    rows = list(dict.fromkeys(sample.map_row for sample in samples if sample.map_row is not None))
    new = {old: number for number, old in enumerate(rows)}
    return ShardObservations(
        [replace(sample, map_row=None if sample.map_row is None else new[sample.map_row]) for sample in samples],
        [whole.maps[row] for row in rows],
    )


def _write(folder: Path, manifest: Manifest, seen: ShardObservations) -> tuple[CommitRecord, float]:
    """Writes a shard; its commit record, and the seconds it took."""
    started = time.perf_counter()
    record = write_shard(open_store(folder), 0, manifest, "samples-000000.tar", seen.samples, seen.maps, [])
    return record, time.perf_counter() - started


def _bytes_by_array(record: CommitRecord) -> tuple[Counter[str], int]:
    """Bytes of data by array, and bytes of all metadata."""
    data: Counter[str] = Counter(dict.fromkeys(UNIT_OF_ARRAY, 0))
    metadata = 0
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
