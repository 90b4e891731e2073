"""An extraction's bytes and seconds, measured on a few samples that go through the code that extracts.

The teacher sees them once; its maps, taken in 16 bits, are then coded and written with every codec.
"""

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch

from stages.estimate.extrapolate import UNIT_OF_ARRAY, CodedProbe, Scale, answer_bytes, predicted
from stages.estimate.report import Estimate, EstimateConfig
from stages.estimate.sampling import CountedRun, Counts, count_runs, plan_runs
from stages.teacher.identity import TeacherConfig, TeacherIdentity
from stages.teacher.observe import Observer, ShardObservations
from stages.teacher.teacher import Teacher, load_teacher
from storage.codecs.config import MapCodecName, num_entries
from storage.codecs.maps import EncodedMaps
from storage.errors import UserError
from storage.samples.index import SampleIndex
from storage.samples.members import StoredSample
from storage.samples.shard import SampleShard
from storage.samples.writer import SampleShardWriter
from storage.stores import Store, open_store
from storage.targets.commits import CommitRecord
from storage.targets.manifest import Manifest
from storage.targets.sample_targets import SampleTargets
from storage.targets.writer import write_shard

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the amount done and the whole."""

CODECS: tuple[MapCodecName, ...] = get_args(MapCodecName)
SHOWN_UNUSABLE = 5


@dataclass(frozen=True)
class _Seen:
    """What the teacher said of the probed samples, and how long that took."""

    whole: ShardObservations
    runs: tuple[ShardObservations, ...]
    seconds_per_sample: float
    batch_size: int


def estimate_by_measurement(
    settings: TeacherConfig,
    samples: Store,
    config: EstimateConfig,
    *,
    workers: int,
    threads: int,
    progress: Progress | None = None,
) -> Estimate:
    """What a whole extraction takes, with each map codec.

    Bytes: counts of a sample (`counting.py`) times bytes of a unit, measured in one shard that the real writer makes of
    the probed samples, plus each shard's metadata. The interval covers the draw of both. Seconds: as the probed samples
    took after a warm-up; on a CPU with one thing after the other, since there the workers share the cores.

    Args:
        settings: as for extraction.
        samples: the sample set.
        config: how many samples are looked at.
        workers: teachers side by side.
        threads: of each, on a CPU.
        progress: what is shown.

    Raises:
        UserError: as extraction for a teacher that cannot be used; no usable sample among those drawn.
    """
    show = progress or (lambda *_: None)
    index = SampleIndex.load(samples)
    runs = plan_runs(index.num_samples, config.runs, config.counted_samples, config.seed)
    torch.set_num_threads(threads)
    started = time.perf_counter()
    show("load teacher", 0, 1)
    # In 16 bits, from which all other codes are made; the teacher then has to look only once.
    teacher = load_teacher(settings.model_copy(update={"map_codec": "float16"}))
    load_seconds = time.perf_counter() - started
    show("load teacher", 1, 1)
    counted = _count(teacher, samples, index, runs, config.probed_samples, show)
    with tempfile.TemporaryDirectory(prefix="cdp-estimate-") as folder:
        seen = _observe(teacher, counted, Path(folder) / "samples", show)
        manifest = _manifest_of(teacher.identity, index)
        coded = _code_all(teacher, seen, settings.map_codec, manifest, Path(folder), show)
        teacher.save_vision(Path(folder) / "teacher")
        vision_bytes = sum(file.stat().st_size for file in (Path(folder) / "teacher").rglob("*") if file.is_file())
    on_gpu = teacher.model.device.type == "cuda"
    scale = Scale(index, counted, workers, on_gpu=on_gpu, load_seconds=load_seconds, vision_bytes=vision_bytes)
    chosen = coded[settings.map_codec]
    unusable = [skipped for run in counted for skipped in run.skipped] + seen.whole.skipped
    share_left = chosen.rates["logit_records"] / teacher.identity.logit_codec.row_bytes
    num_rows = scale.per_sample["answer_rows"] * index.num_samples
    return Estimate(
        basis="probe",
        teacher=settings.checkpoint,
        samples_url=samples.url,
        num_samples=index.num_samples,
        num_shards=len(index.shards),
        counted_samples=scale.num_read,
        probed_samples=len(seen.whole.samples) + len(seen.whole.skipped),
        per_sample=scale.per_sample,
        unusable=dict(Counter(skipped.reason for skipped in unusable).most_common()),
        unusable_examples=tuple(f"{s.key}: {s.reason}: {s.detail}" for s in unusable[:SHOWN_UNUSABLE]),
        device=torch.cuda.get_device_name() if on_gpu else "CPU",
        workers=workers,
        threads=threads,
        load_seconds=load_seconds,
        teacher_seconds_per_sample=seen.seconds_per_sample,
        coding_seconds_per_map={name: each.coding_seconds for name, each in coded.items()},
        writing_seconds_per_shard={name: scale.writing_seconds(each) for name, each in coded.items()},
        chosen=settings.map_codec,
        settings={name: scale.setting(each, seen.seconds_per_sample, coded["float16"]) for name, each in coded.items()},
        answer_bytes_by_top_k=answer_bytes(teacher.identity.logit_codec, num_rows, share_left),
        files_per_shard=chosen.num_files + 1,
        notes=_notes(scale, seen, on_gpu=on_gpu) + teacher.identity.notes,
    )


def _manifest_of(identity: TeacherIdentity, index: SampleIndex) -> Callable[[MapCodecName], Manifest]:
    """The manifest that extraction would write with a codec."""
    return lambda name: replace(identity, codec=identity.codec.model_copy(update={"name": name})).manifest(
        index.digest, len(index.shards)
    )


def _count(
    teacher: Teacher,
    samples: Store,
    index: SampleIndex,
    runs: Sequence[range],
    num_probed: int,
    show: Progress,
) -> list[CountedRun]:
    total = sum(map(len, runs))
    done = 0

    def advance(number: int) -> None:
        nonlocal done
        done += number
        show("count", done, total)

    with Observer(teacher) as observer:
        batch_size = observer.batch_size.value
    counted = count_runs(
        samples,
        index,
        teacher.encoder,
        runs,
        causal=teacher.identity.codec.causal,
        num_kept=-(-max(num_probed, 2 * batch_size) // len(runs)),
        progress=advance,
    )
    if not any(run.kept for run in counted):
        reasons = Counter(skipped.reason for run in counted for skipped in run.skipped)
        raise UserError(
            f"none of {total} samples drawn from {samples.url} can be used "
            f"({', '.join(f'{reason}: {count}' for reason, count in reasons.most_common())})"
        )
    return counted


def _observe(teacher: Teacher, runs: Sequence[CountedRun], folder: Path, show: Progress) -> _Seen:
    """The kept samples as one shard through the teacher, after a first batch that is not counted."""
    kept = [sample for run in runs for sample in run.kept]
    with Observer(teacher, overlap=teacher.model.device.type == "cuda") as observer:
        with _packed(folder / "warm-up", kept[: observer.batch_size.value]) as shard:
            observer.observe(shard)
        done = 0

        def advance(number: int) -> None:
            nonlocal done
            done += number
            show("probe", done, len(kept))

        with _packed(folder / "kept", kept) as shard:
            started = time.perf_counter()
            whole = observer.observe(shard, advance)
            seconds = time.perf_counter() - started
        batch_size = observer.batch_size.value
    keys = [{sample.key for sample in run.kept} for run in runs]
    parts = [_part(whole, wanted) for wanted in keys]
    return _Seen(whole, tuple(part for part in parts if part.samples), seconds / len(kept), batch_size)


def _packed(folder: Path, samples: Sequence[StoredSample]) -> SampleShard:
    """These samples as a shard of their own, open."""
    with SampleShardWriter(folder, len(samples), 2**63) as writer:
        writer.add_group(samples)
    store = open_store(folder)
    return SampleShard.open(store, SampleIndex.load(store).shards[0])


def _part(whole: ShardObservations, keys: set[str]) -> ShardObservations:
    """Those of the samples, their maps numbered anew."""
    samples = [sample for sample in whole.samples if sample.key in keys]
    rows = list(dict.fromkeys(sample.map_row for sample in samples if sample.map_row is not None))
    new = {old: number for number, old in enumerate(rows)}
    return ShardObservations(
        [replace(sample, map_row=None if sample.map_row is None else new[sample.map_row]) for sample in samples],
        [whole.maps[row] for row in rows],
    )


def _code_all(
    teacher: Teacher,
    seen: _Seen,
    chosen: MapCodecName,
    manifest_of: Callable[[MapCodecName], Manifest],
    folder: Path,
    show: Progress,
) -> dict[MapCodecName, CodedProbe]:
    """The probed samples in every codec; how runs differ, and what a shard costs to write, is measured with one."""
    show("code and write", 0, len(CODECS))
    coded = {chosen: _code(teacher, seen, manifest_of(chosen), folder / chosen)}
    for name in CODECS:
        show("code and write", len(coded), len(CODECS))
        if name != chosen:
            coded[name] = _code(teacher, seen, manifest_of(name), folder / name, like=coded[chosen])
    show("code and write", len(coded), len(CODECS))
    return {name: coded[name] for name in CODECS}


def _code(
    teacher: Teacher, seen: _Seen, manifest: Manifest, folder: Path, like: CodedProbe | None = None
) -> CodedProbe:
    causal = manifest.fingerprint.map_codec.causal
    started = time.perf_counter()
    whole = _recoded(teacher, seen.whole, manifest)
    coding_seconds = (time.perf_counter() - started) / max(len(whole.maps), 1)
    parts = [] if like else [_part(whole, {sample.key for sample in run.samples}) for run in seen.runs]
    written = [_written(folder / str(number), manifest, part) for number, part in enumerate(parts)]
    record, seconds = _written(folder / "whole", manifest, whole)
    data, metadata_bytes = _bytes_by_array(record)
    units = _units(whole.samples, whole.maps, causal=causal)
    rates = {array: size / max(units[UNIT_OF_ARRAY[array]], 1) for array, size in data.items()}
    if like is None:
        expected = [predicted(rates, _units(part.samples, part.maps, causal=causal)) for part in parts]
        run_bytes = [_bytes_by_array(run_record)[0].total() for run_record, _ in written]
        ratios = [size / each for size, each in zip(run_bytes, expected, strict=True)]
        spread = statistics.stdev(ratios) / statistics.mean(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else 0.0
        # A run is little more than what every shard costs, whatever is in it.
        fixed_seconds = statistics.median(run_seconds for _, run_seconds in written)
        more_bytes = data.total() - statistics.median(run_bytes)
        per_byte = max(0.0, (seconds - fixed_seconds) / more_bytes) if more_bytes > 0 else 0.0
    else:
        spread, fixed_seconds, per_byte = like.spread, like.fixed_seconds, like.seconds_per_byte
    return CodedProbe(
        rates=rates,
        metadata_bytes=metadata_bytes,
        commit_bytes=len(record.to_bytes()),
        num_files=len(record.files),
        spread=spread,
        coding_seconds=coding_seconds,
        fixed_seconds=fixed_seconds,
        seconds_per_byte=per_byte,
    )


def _recoded(teacher: Teacher, seen: ShardObservations, manifest: Manifest) -> ShardObservations:
    """The 16-bit maps in another code, made on the teacher's device."""
    identity, device, cpu = teacher.identity, teacher.model.device, torch.device("cpu")
    stored = identity.map_codec
    other = replace(stored, config=manifest.fingerprint.map_codec)
    maps = [other.encode(stored.decode(entry.to(device))).to(cpu) for entry in seen.maps]
    return ShardObservations(seen.samples, maps)


def _written(folder: Path, manifest: Manifest, seen: ShardObservations) -> tuple[CommitRecord, float]:
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


def _units(samples: Sequence[SampleTargets], maps: Sequence[EncodedMaps], *, causal: bool) -> Counts:
    return {
        "samples": len(samples),
        "tokens": sum(len(sample.token_ids) for sample in samples),
        "answer_rows": sum(len(sample.logits_RQ) for sample in samples),
        "maps": len(maps),
        "image_tokens": sum(entry.num_tokens for entry in maps),
        "map_entries": sum(num_entries(entry.num_tokens, causal) for entry in maps),
    }


def _notes(scale: Scale, seen: _Seen, *, on_gpu: bool) -> tuple[str, ...]:
    notes = [
        f"teacher timed on {len(seen.whole.samples)} samples in batches of at most {seen.batch_size}",
        "starting Ray and reading samples over a network are not in the time",
    ]
    if on_gpu:
        notes.append("coding and writing are taken to go on beside the teacher")
    if scale.num_read == scale.num_samples:
        notes.append("every sample was read: the interval is for what the teacher did not see")
    return tuple(notes)
