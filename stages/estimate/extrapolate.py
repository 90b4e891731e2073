"""From bytes and seconds of a few samples to those of a whole extraction."""

import heapq
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from stages.estimate.report import SHOWN_UNUSABLE, Estimate, SettingEstimate, TeacherCost
from stages.estimate.sampling import UNITS, Counts, SetCounts
from stages.teacher.config import TeacherConfig
from stages.teacher.identity import TeacherIdentity
from storage.codecs.codec_settings import LogitCodecConfig, MapCodecName
from storage.targets.commits import SkippedSample
from storage.targets.layout import ALL_ARRAYS

TOP_KS = (16, 32, 48, 64, 128, 256)

UNIT_OF_ARRAY = {
    spec.name: next(unit for letter in spec.letters for unit, letters in UNITS.items() if letter in letters)
    for spec in ALL_ARRAYS
}
"""What an array's bytes grow with: its one dimension that is not the same in every shard."""


@dataclass(frozen=True)
class CodecCost:
    """What samples take as one map codec stores them; what is not measured is 0."""

    rates: Mapping[str, float]
    """Array -> bytes of one of its unit."""
    metadata_bytes: int
    """Of a shard, whatever is in it."""
    num_files: int
    commit_bytes: int = 0
    coding_seconds: float = 0.0
    """For each map."""
    spread: float | None = None
    """Standard error of the rates over the blocks, as a share of them; None where they are assumed."""
    fixed_seconds: float = 0.0
    """Writing a shard of nothing."""
    seconds_per_byte: float = 0.0


def extrapolate(
    settings: TeacherConfig,
    identity: TeacherIdentity,
    held: SetCounts,
    costs: Mapping[MapCodecName, CodecCost],
    teacher: TeacherCost,
    *,
    workers: int,
    notes: Sequence[str],
    skipped: Sequence[SkippedSample] = (),
) -> Estimate:
    """The whole extraction with each map codec, by `workers` teachers side by side; `skipped` are the teacher's."""
    chosen, logit_codec = costs[settings.map_codec], identity.logit_codec
    num_rows = held.per_sample["answer_rows"] * held.num_samples
    unusable = [*held.skipped, *skipped]
    measured = costs if teacher.num_measured else {}
    return Estimate(
        **dict(teacher),
        basis="measured" if teacher.num_measured else "analytic",
        teacher=settings.checkpoint,
        samples_url=held.url,
        num_samples=held.num_samples,
        num_shards=len(held.shard_sizes),
        num_sampled=held.num_read,
        per_sample=held.per_sample,
        unusable=dict(Counter(one.reason for one in unusable).most_common()),
        unusable_examples=tuple(f"{one.key}: {one.reason}: {one.detail}" for one in unusable[:SHOWN_UNUSABLE]),
        cut_samples=len(held.cuts),
        cut_answer_tokens=sum(held.cuts),
        workers=workers,
        coding_seconds_per_map={name: cost.coding_seconds for name, cost in measured.items()},
        writing_seconds_per_shard={name: _writing_seconds(held, cost) for name, cost in measured.items()},
        chosen=settings.map_codec,
        settings={name: _setting(held, teacher, cost, costs["float16"], workers) for name, cost in costs.items()},
        answer_row_bytes=logit_codec.row_bytes,
        answer_row_bytes_at_1=replace(
            identity, settings=settings.model_copy(update={"temperatures": ()})
        ).logit_codec.row_bytes,
        answer_bytes_by_top_k=_answer_bytes(
            logit_codec, num_rows * chosen.rates["logit_records"] / logit_codec.row_bytes
        ),
        files_per_shard=chosen.num_files + 1,
        notes=(*notes, *identity.notes),
    )


def predicted(rates: Mapping[str, float], units: Counts) -> float:
    """Bytes of so many units."""
    return sum(rate * units[UNIT_OF_ARRAY[array]] for array, rate in rates.items())


def relative_error(values: Sequence[float], mean: float) -> float:
    """Standard error of the mean of some values, as a share of it; 0 for a single value."""
    return statistics.stdev(values) / mean / math.sqrt(len(values)) if len(values) > 1 and mean else 0.0


def _writing_seconds(held: SetCounts, cost: CodecCost) -> float:
    """Of an average shard."""
    data = predicted(cost.rates, held.per_sample) * held.num_samples
    return cost.fixed_seconds + cost.seconds_per_byte * data / len(held.shard_sizes)


def _setting(
    held: SetCounts, teacher: TeacherCost, cost: CodecCost, float16: CodecCost, workers: int
) -> SettingEstimate:
    num_samples, num_shards = held.num_samples, len(held.shard_sizes)
    by_array = {array: rate * held.per_sample[UNIT_OF_ARRAY[array]] * num_samples for array, rate in cost.rates.items()}
    data, metadata = sum(by_array.values()), cost.metadata_bytes * num_shards
    shard_bytes = data + metadata
    half = None if cost.spread is None else data * _half_interval(held, cost.rates, cost.spread)
    seconds = teacher.teacher_seconds_per_sample * num_samples
    num_maps = held.per_sample["maps"] * num_samples
    writing = _writing_seconds(held, cost) * num_shards
    if teacher.device != "CPU":
        seconds = max(seconds, cost.coding_seconds * num_maps + writing)
    else:
        # The measured teacher coded in 16 bits; that took its part of the time.
        seconds += (cost.coding_seconds - float16.coding_seconds) * num_maps + writing
    return SettingEstimate(
        shard_bytes=round(shard_bytes),
        shard_bytes_95=None if half is None else (round(max(shard_bytes - half, 0)), round(shard_bytes + half)),
        bytes_by_array={"(metadata)": metadata} | {array: round(size) for array, size in by_array.items()},
        store_bytes=round(shard_bytes + cost.commit_bytes * num_shards + teacher.vision_bytes),
        worker_seconds=seconds,
        wall_seconds=teacher.load_seconds + seconds * longest_share(held.shard_sizes, workers),
    )


def _half_interval(held: SetCounts, rates: Mapping[str, float], spread: float) -> float:
    """Half the 95 % interval of the data's bytes, as a share of them."""
    if len(held.blocks) < 2:
        return 0.0
    each = [predicted(rates, block.counts) / block.num_read for block in held.blocks]
    # Where the whole set was read, the counts are exact.
    counts = relative_error(each, predicted(rates, held.per_sample)) * math.sqrt(1 - held.num_read / held.num_samples)
    return student_t(len(each) - 1) * math.hypot(counts, spread)


def _answer_bytes(codec: LogitCodecConfig, rows_left: float) -> dict[int, int]:
    """Kept tokens -> bytes of all answer rows, of which zstd leaves as many bytes as `rows_left` rows have."""
    top_ks = sorted({min(top_k, codec.vocab_size) for top_k in (*TOP_KS, codec.top_k)})
    return {top_k: round(rows_left * codec.model_copy(update={"top_k": top_k}).row_bytes) for top_k in top_ks}


def longest_share(shard_sizes: Sequence[int], workers: int) -> float:
    """The part of all samples that the busiest worker gets, when each takes the next shard as soon as it is free."""
    done = [0] * workers
    for size in shard_sizes:
        heapq.heapreplace(done, done[0] + size)
    return max(done) / sum(shard_sizes)


def student_t(freedom: int) -> float:
    """97.5 % quantile of Student's t.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5; off by 3 % with 2 degrees of freedom.
    """
    if freedom == 1:
        return 12.706
    z = statistics.NormalDist().inv_cdf(0.975)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
