"""An extraction's bytes and seconds, measured on a few samples that go through the code that extracts.

The teacher sees them once; its maps, taken in 16 bits, are then coded and written with every codec.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from stages.estimate.codec_costs import measure_codecs
from stages.estimate.extrapolate import TeacherCost, extrapolate
from stages.estimate.report import Estimate, EstimateConfig
from stages.estimate.sampling import SetCounts, sample_set
from stages.teacher.batching import BatchSize
from stages.teacher.identity import TeacherConfig
from stages.teacher.observe import Observer, ShardObservations
from stages.teacher.teacher import Teacher, load_teacher
from storage.errors import UserError
from storage.progress import SILENT, Progress
from storage.samples.members import StoredSample
from storage.samples.sample_set import SampleSet
from storage.samples.shard import SampleShard
from storage.samples.writer import SampleShardWriter


def estimate_by_measurement(
    settings: TeacherConfig,
    samples: SampleSet,
    config: EstimateConfig,
    *,
    workers: int,
    threads: int,
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
    teacher = load_teacher(settings.model_copy(update={"map_codec": "float16"}))
    load_seconds = time.perf_counter() - started
    loading.advance()
    held = _sample(teacher, samples, config, progress)
    kept = [sample for block in held.blocks for sample in block.kept]
    with tempfile.TemporaryDirectory(prefix="cdp-estimate-") as name:
        folder = Path(name)
        seen, seconds, batch_size = _run_teacher(teacher, kept, folder / "samples", progress)
        costs = measure_codecs(teacher, seen, held.blocks, samples.index, settings.map_codec, folder, progress)
        teacher.save_vision(folder / "teacher")
        vision_bytes = sum(file.stat().st_size for file in (folder / "teacher").rglob("*") if file.is_file())
    on_gpu = teacher.model.device.type == "cuda"
    cost = TeacherCost(
        device=torch.cuda.get_device_name() if on_gpu else "CPU",
        on_gpu=on_gpu,
        seconds_per_sample=seconds / len(kept),
        threads=threads,
        load_seconds=load_seconds,
        vision_bytes=vision_bytes,
        num_measured=len(seen.samples) + len(seen.skipped),
        skipped=seen.skipped,
    )
    notes = [
        f"the teacher was timed on {len(seen.samples)} samples in batches of at most {batch_size}",
        "the time does not include starting Ray and reading samples over a network",
    ]
    if on_gpu:
        notes.append("the estimate takes coding and writing to go on beside the teacher")
    if held.num_read == held.num_samples:
        notes.append("every sample was read: the interval is for what the teacher did not see")
    return extrapolate(settings, teacher.identity, samples.store.url, held, costs, cost, workers=workers, notes=notes)


def _sample(teacher: Teacher, samples: SampleSet, config: EstimateConfig, progress: Progress) -> SetCounts:
    """Counts of the sample set, with enough usable samples for two batches of the teacher."""
    identity = teacher.identity
    batch_size = BatchSize(identity.settings.batch_size, on_gpu=teacher.model.device.type == "cuda").value
    held = sample_set(
        samples,
        teacher.encoder,
        config,
        causal=identity.codec.causal,
        num_kept=max(config.num_measured, 2 * batch_size),
        progress=progress,
    )
    if not held.per_sample["samples"]:
        reasons = Counter(skipped.reason for skipped in held.skipped)
        raise UserError(
            f"none of {held.num_read} samples drawn from {samples.store.url} can be used "
            f"({', '.join(f'{reason}: {count}' for reason, count in reasons.most_common())})"
        )
    return held


def _run_teacher(
    teacher: Teacher, kept: Sequence[StoredSample], folder: Path, progress: Progress
) -> tuple[ShardObservations, float, int]:
    """The samples as one shard through the teacher, after a first batch that is not timed; seconds and batch size."""
    with Observer(teacher, overlap=teacher.model.device.type == "cuda") as observer:
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
