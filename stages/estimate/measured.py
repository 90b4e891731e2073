"""An extraction's bytes and seconds, measured on a few samples that go through the code that extracts.

The teacher sees them once; its maps, taken in 16 bits, are then coded and written with every codec.
"""

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch

from stages.estimate.analytic import saved_notes
from stages.estimate.extrapolate import UNIT_OF_ARRAY, CodecCost, extrapolate, predicted, relative_error
from stages.estimate.report import Estimate, EstimateConfig, TeacherCost
from stages.estimate.sampling import Counts, SampledBlock, count_blocks, count_units, plan_blocks
from stages.teacher.batching import BatchSize
from stages.teacher.config import TeacherConfig
from stages.teacher.observe import Observer, ShardObservations
from stages.teacher.teacher import Teacher, load_teacher
from stages.tempered_noise import noise_notes
from storage.codecs.answer_attention import num_answers
from storage.codecs.codec_settings import MapCodecConfig, MapCodecName
from storage.errors import UserError
from storage.progress import SILENT, Progress
from storage.samples.image_settings import DEFAULT_IMAGES, ImageConfig
from storage.samples.index import SampleIndex
from storage.samples.members import StoredSample
from storage.samples.sample_set import SampleSet
from storage.samples.shard_reader import SampleShard
from storage.samples.shard_writer import SampleShardWriter
from storage.stores import open_store
from storage.targets.commits import CommitRecord, SkippedSample
from storage.targets.layout import ALL_ARRAYS
from storage.targets.manifest import Manifest
from storage.targets.sample_targets import SampleTargets
from storage.targets.shard_writer import write_shard

CODECS: tuple[MapCodecName, ...] = get_args(MapCodecName)


def estimate_by_measurement(
    settings: TeacherConfig,
    samples: SampleSet,
    config: EstimateConfig,
    images: ImageConfig = DEFAULT_IMAGES,
    *,
    workers: int,
    threads: int,
    gpus_per_worker: int = 1,
    progress: Progress = SILENT,
) -> Estimate:
    """What a whole extraction by `workers` teachers takes, each with `threads` on a CPU.

    Bytes: counts of a sample (`sampling.py`) times bytes of a unit, measured in one shard that the real writer makes of
    the measured samples, plus each shard's metadata. The interval covers the choice of both. Seconds: as the measured
    samples took after a warm-up; on a CPU with one thing after the other, since there the workers share the cores.

    Raises:
        UserError: If extraction would refuse the teacher, or none of the chosen samples can be used.
    """
    torch.set_num_threads(threads)
    started = time.perf_counter()
    loading = progress.task("load teacher", 1, unit="teachers")
    # In 16 bits, from which all other codes are made: so the teacher has to run only once.
    teacher = load_teacher(settings.model_copy(update={"map_codec": "float16"}), images, gpus_per_worker)
    load_seconds = time.perf_counter() - started
    loading.advance()
    on_gpu, planned = bool(teacher.gpus), plan_blocks(samples.index.num_samples, config)
    held = count_blocks(
        *(samples, teacher.encoder, planned),
        causal=teacher.identity.codec.causal,
        rules=teacher.identity.image_rules,
        num_kept=max(config.num_measured, 2 * BatchSize(settings.batch_size, on_gpu=on_gpu).value),
        progress=progress,
    )
    kept = [sample for block in held.blocks for sample in block.kept]
    if not kept:
        raise _none_usable(f"drawn from {samples.store.url}", held.skipped)
    with tempfile.TemporaryDirectory(prefix="cdp-estimate-") as name:
        folder = Path(name)
        seen, seconds, batch_size = _run_teacher(teacher, kept, folder / "samples", progress)
        if not seen.samples:
            raise _none_usable(f"of {samples.store.url} that the teacher was given", seen.skipped)
        costs = _measure_codecs(teacher, seen, held.blocks, samples.index, settings.map_codec, folder, progress)
        teacher.save_vision(folder / "teacher")
        vision_bytes = sum(file.stat().st_size for file in (folder / "teacher").rglob("*") if file.is_file())
    cost = TeacherCost(
        device=torch.cuda.get_device_name() if on_gpu else "CPU",
        teacher_seconds_per_sample=seconds / len(kept),
        threads=threads,
        gpus_per_worker=gpus_per_worker,
        load_seconds=load_seconds,
        vision_bytes=vision_bytes,
        num_measured=len(seen.samples) + len(seen.skipped),
    )
    notes = [
        f"the teacher was timed on {len(seen.samples)} samples in batches of at most {batch_size}",
        "the time does not include starting Ray and reading samples over a network",
        *saved_notes(teacher.identity, held.per_sample),
        *["the estimate takes coding and writing to go on beside the teacher"] * on_gpu,
    ]
    codec = teacher.identity.logit_codec
    notes += noise_notes(codec, [sample.logits_RQ for sample in seen.samples], codec.temperatures)
    if held.num_read == held.num_samples:
        notes.append("every sample was read: the interval is for what the teacher did not see")
    return extrapolate(
        settings, teacher.identity, held, costs, cost, skipped=seen.skipped, workers=workers, notes=notes
    )


def _none_usable(which: str, skipped: Sequence[SkippedSample]) -> UserError:
    counts = Counter(one.reason for one in skipped).most_common()
    why = ", ".join(f"{reason}: {count}" for reason, count in counts)
    return UserError(f"none of {len(skipped)} samples {which} can be used ({why})")


def _run_teacher(
    teacher: Teacher, kept: Sequence[StoredSample], folder: Path, progress: Progress
) -> tuple[ShardObservations, float, int]:
    """The samples as one shard through the teacher, after a first batch that is not timed; seconds and batch size."""
    with Observer(teacher, overlap=bool(teacher.gpus)) as observer:
        with _packed(folder / "warm-up", kept[: observer.batch_size.value]) as shard:
            observer.observe(shard)
        task = progress.task("run teacher", len(kept))
        with _packed(folder / "kept", kept) as shard:
            started = time.perf_counter()
            seen = observer.observe(shard, task.advance)
            return seen, time.perf_counter() - started, observer.batch_size.value


def _packed(folder: Path, samples: Sequence[StoredSample]) -> SampleShard:
    """These samples as a shard of their own, open."""
    with SampleShardWriter(folder, len(samples), 2**63) as writer:
        writer.add_group(samples)
    return SampleSet.open(folder).shard(0)


def _measure_codecs(
    teacher: Teacher,
    seen: ShardObservations,
    blocks: Sequence[SampledBlock],
    index: SampleIndex,
    chosen: MapCodecName,
    folder: Path,
    progress: Progress,
) -> dict[MapCodecName, CodecCost]:
    """Codes the 16-bit maps that the teacher saw with every codec, and writes them as shards below `folder`."""
    task = progress.task("code and write", len(CODECS), unit="codecs")
    device, cpu, causal = teacher.device, torch.device("cpu"), teacher.identity.codec.causal
    costs: dict[MapCodecName, CodecCost] = {}
    for name in (chosen, *(name for name in CODECS if name != chosen)):
        # Made anew, as extraction makes it: the default of `cap_factor` depends on the name.
        codec = MapCodecConfig.of_windows(name, teacher.identity.windows, causal=causal)
        identity = replace(teacher.identity, codec=codec)
        manifest = identity.manifest(index.digest, len(index.shards))
        stored, other = teacher.identity.map_codec, identity.map_codec
        started = time.perf_counter()
        on_device = [entry.to(device) for entry in seen.maps]
        maps = [other.encode(stored.decode(entry), entry.cells_X).to(cpu) for entry in on_device]
        coding_seconds = (time.perf_counter() - started) / max(len(maps), 1)
        recoded = ShardObservations(seen.samples, maps)
        if name == chosen:
            # How blocks differ, and what a shard costs to write, is measured with this codec alone.
            parts = [_part(recoded, {sample.key for sample in block.kept}) for block in blocks]
            parts = [part for part in parts if part.samples]
            written = [_write(folder / name / str(number), manifest, part) for number, part in enumerate(parts)]
        record, seconds = _write(folder / name / "whole", manifest, recoded)
        data, units = _data_bytes(record), _units(recoded, causal=causal)
        rates = {array: size / max(units[UNIT_OF_ARRAY[array]], 1) for array, size in data.items()}
        if name == chosen:
            part_bytes = [_data_bytes(part_record).total() for part_record, _ in written]
            # A block is little more than what every shard costs, whatever is in it.
            fixed_seconds = statistics.median(part_seconds for _, part_seconds in written)
            more_bytes = data.total() - statistics.median(part_bytes)
            per_byte = max(0.0, (seconds - fixed_seconds) / more_bytes) if more_bytes > 0 else 0.0
            expected = [predicted(rates, _units(part, causal=causal)) for part in parts]
            ratios = [size / each for size, each in zip(part_bytes, expected, strict=True)]
        costs[name] = CodecCost(
            rates=rates,
            metadata_bytes=sum(info.bytes for info in record.files.values()) - data.total(),
            num_files=len(record.files),
            commit_bytes=len(record.to_bytes()),
            coding_seconds=coding_seconds,
            spread=relative_error(ratios, statistics.mean(ratios)),
            fixed_seconds=fixed_seconds,
            seconds_per_byte=per_byte,
        )
        task.advance()
    return {name: costs[name] for name in CODECS}


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


def _data_bytes(record: CommitRecord) -> Counter[str]:
    """Bytes of data by array; all others are metadata."""
    written = {path.partition("/")[0] for path in record.files}
    data = Counter({spec.name: 0 for spec in ALL_ARRAYS if spec.name in written})
    for path, info in record.files.items():
        name, _, below = path.partition("/")
        if below == "c" or below.startswith("c/"):
            data[name] += info.bytes
    return data


def _units(seen: ShardObservations, *, causal: bool) -> Counts:
    return count_units(
        [len(sample.token_ids) for sample in seen.samples],
        [len(sample.logits_RQ) for sample in seen.samples],
        [_answer_keys(sample, seen) for sample in seen.samples],
        [(1, entry.num_tokens) for entry in seen.maps],
        causal=causal,
    )


def _answer_keys(sample: SampleTargets, seen: ShardObservations) -> int:
    return 0 if sample.map_row is None else num_answers(sample.answer_mask) * seen.maps[sample.map_row].num_tokens
