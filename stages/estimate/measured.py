"""An extraction's bytes and seconds, measured on a few samples that go through the code that extracts.

The teacher sees them once; its maps, taken in 16 bits, are then coded and written with every codec.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stages.estimate.codec_costs import measure_codecs
from stages.estimate.extrapolate import Extrapolation, answer_bytes
from stages.estimate.report import Estimate, EstimateConfig, unusable_fields
from stages.estimate.sampling import SampledBlock, SetCounts, sample_set
from stages.teacher.identity import TeacherConfig
from stages.teacher.observe import Observer, ShardObservations
from stages.teacher.teacher import Teacher, load_teacher
from storage.errors import UserError
from storage.progress import SILENT, Progress
from storage.samples.members import StoredSample
from storage.samples.sample_set import SampleSet
from storage.samples.shard import SampleShard
from storage.samples.writer import SampleShardWriter


@dataclass(frozen=True)
class _Seen:
    """What the teacher said of the measured samples, and how long that took."""

    shard: ShardObservations
    seconds_per_sample: float
    batch_size: int


def estimate_by_measurement(
    settings: TeacherConfig,
    samples: SampleSet,
    config: EstimateConfig,
    *,
    workers: int,
    threads: int,
    progress: Progress = SILENT,
) -> Estimate:
    """What a whole extraction takes, with each map codec.

    Bytes: counts of a sample (`sampling.py`) times bytes of a unit, measured in one shard that the real writer makes of
    the measured samples, plus each shard's metadata. The interval covers the choice of both. Seconds: as the measured
    samples took after a warm-up; on a CPU with one thing after the other, since there the workers share the cores.

    Args:
        settings: as for extraction.
        samples: the sample set.
        config: how many samples are looked at.
        workers: teachers side by side.
        threads: of each, on a CPU.
        progress: where the steps are shown.

    Raises:
        UserError: If extraction would refuse the teacher, or none of the chosen samples can be used.
    """
    torch.set_num_threads(threads)
    started = time.perf_counter()
    loading = progress.task("load teacher", 1, unit="teachers")
    # In 16 bits, from which all other codes are made: so the teacher has to run only once.
    teacher = load_teacher(settings.model_copy(update={"map_codec": "float16"}))
    load_seconds = time.perf_counter() - started
    loading.advance()
    held = _sample(teacher, samples, config, progress)
    with tempfile.TemporaryDirectory(prefix="cdp-estimate-") as name:
        folder = Path(name)
        seen = _run_teacher(teacher, held.blocks, folder / "samples", progress)
        blocks = [{sample.key for sample in block.kept} for block in held.blocks]
        costs = measure_codecs(teacher, seen.shard, blocks, samples.index, settings.map_codec, folder, progress)
        teacher.save_vision(folder / "teacher")
        vision_bytes = sum(file.stat().st_size for file in (folder / "teacher").rglob("*") if file.is_file())
    on_gpu = teacher.model.device.type == "cuda"
    whole = Extrapolation(
        held,
        workers,
        on_gpu=on_gpu,
        teacher_seconds=seen.seconds_per_sample,
        float16=costs["float16"],
        load_seconds=load_seconds,
        vision_bytes=vision_bytes,
    )
    chosen, logit_codec = costs[settings.map_codec], teacher.identity.logit_codec
    num_rows = held.per_sample["answer_rows"] * held.num_samples
    return Estimate(
        basis="measured",
        teacher=settings.checkpoint,
        samples_url=samples.store.url,
        num_samples=held.num_samples,
        num_shards=len(held.shard_sizes),
        num_sampled=held.num_read,
        num_measured=len(seen.shard.samples) + len(seen.shard.skipped),
        per_sample=held.per_sample,
        **unusable_fields(held.skipped + seen.shard.skipped),
        device=torch.cuda.get_device_name() if on_gpu else "CPU",
        workers=workers,
        threads=threads,
        load_seconds=load_seconds,
        teacher_seconds_per_sample=seen.seconds_per_sample,
        coding_seconds_per_map={name: cost.coding_seconds for name, cost in costs.items()},
        writing_seconds_per_shard={name: whole.writing_seconds(cost) for name, cost in costs.items()},
        chosen=settings.map_codec,
        settings={name: whole.setting(cost) for name, cost in costs.items()},
        answer_bytes_by_top_k=answer_bytes(
            logit_codec, num_rows, chosen.rates["logit_records"] / logit_codec.row_bytes
        ),
        files_per_shard=chosen.num_files + 1,
        notes=_notes(held, seen, on_gpu=on_gpu) + teacher.identity.notes,
    )


def _sample(teacher: Teacher, samples: SampleSet, config: EstimateConfig, progress: Progress) -> SetCounts:
    """Counts of the sample set, with enough usable samples for two batches of the teacher."""
    with Observer(teacher) as observer:
        two_batches = 2 * observer.batch_size.value
    held = sample_set(
        samples,
        teacher.encoder,
        config,
        causal=teacher.identity.codec.causal,
        num_kept=max(config.num_measured, two_batches),
        progress=progress,
    )
    if not any(block.kept for block in held.blocks):
        reasons = Counter(skipped.reason for skipped in held.skipped)
        raise UserError(
            f"none of {held.num_read} samples drawn from {samples.store.url} can be used "
            f"({', '.join(f'{reason}: {count}' for reason, count in reasons.most_common())})"
        )
    return held


def _run_teacher(teacher: Teacher, blocks: Sequence[SampledBlock], folder: Path, progress: Progress) -> _Seen:
    """The kept samples as one shard through the teacher, after a first batch that is not timed."""
    kept = [sample for block in blocks for sample in block.kept]
    with Observer(teacher, overlap=teacher.model.device.type == "cuda") as observer:
        with _packed(folder / "warm-up", kept[: observer.batch_size.value]) as shard:
            observer.observe(shard)
        task = progress.task("run teacher", len(kept))
        with _packed(folder / "kept", kept) as shard:
            started = time.perf_counter()
            seen = observer.observe(shard, task.advance)
            seconds = time.perf_counter() - started
        return _Seen(seen, seconds / len(kept), observer.batch_size.value)


def _packed(folder: Path, samples: Sequence[StoredSample]) -> SampleShard:
    """These samples as a shard of their own, open."""
    with SampleShardWriter(folder, len(samples), 2**63) as writer:
        writer.add_group(samples)
    return SampleSet.open(folder).shard(0)


def _notes(held: SetCounts, seen: _Seen, *, on_gpu: bool) -> tuple[str, ...]:
    notes = [
        f"the teacher was timed on {len(seen.shard.samples)} samples in batches of at most {seen.batch_size}",
        "the time does not include starting Ray and reading samples over a network",
    ]
    if on_gpu:
        notes.append("the estimate takes coding and writing to go on beside the teacher")
    if held.num_read == held.num_samples:
        notes.append("every sample was read: the interval is for what the teacher did not see")
    return tuple(notes)
