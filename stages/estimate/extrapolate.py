"""From bytes and seconds of a few samples to those of a whole extraction."""

import heapq
import math
import statistics
from collections.abc import Sequence

from stages.estimate.codec_costs import UNIT_OF_ARRAY, CodecCost, predicted
from stages.estimate.report import SettingEstimate
from stages.estimate.sampling import SetCounts
from storage.codecs.config import LogitCodecConfig

METADATA = "(metadata)"
TOP_KS = (16, 32, 48, 64, 128, 256)


class Extrapolation:
    """The whole extraction, from the cost of each codec on the measured samples.

    Args:
        held: what the sample set holds.
        workers: teachers side by side.
        on_gpu: whether coding and writing go on beside the teacher.
        teacher_seconds: the teacher's for a sample, with the coding in 16 bits.
        float16: cost of the codec in 16 bits, in which the teacher's maps were taken.
        load_seconds: for loading the teacher.
        vision_bytes: of the folder `teacher/`.
    """

    def __init__(
        self,
        held: SetCounts,
        workers: int,
        *,
        on_gpu: bool,
        teacher_seconds: float,
        float16: CodecCost,
        load_seconds: float,
        vision_bytes: int,
    ) -> None:
        self._held, self._on_gpu = held, on_gpu
        self._teacher_seconds, self._float16 = teacher_seconds, float16
        self._load_seconds, self._vision_bytes = load_seconds, vision_bytes
        self._longest_share = longest_share(held.shard_sizes, workers)
        self._num_shards = len(held.shard_sizes)

    def writing_seconds(self, cost: CodecCost) -> float:
        """Of an average shard."""
        data = predicted(cost.rates, self._held.per_sample) * self._held.num_samples
        return cost.fixed_seconds + cost.seconds_per_byte * data / self._num_shards

    def setting(self, cost: CodecCost) -> SettingEstimate:
        """The whole extraction with one codec."""
        by_array = {
            array: rate * self._held.per_sample[UNIT_OF_ARRAY[array]] * self._held.num_samples
            for array, rate in cost.rates.items()
        }
        data, metadata = sum(by_array.values()), cost.metadata_bytes * self._num_shards
        half = data * self._relative_error(cost)
        shard_bytes = data + metadata
        seconds = self._worker_seconds(cost)
        return SettingEstimate(
            shard_bytes=round(shard_bytes),
            shard_bytes_95=(round(max(shard_bytes - half, 0)), round(shard_bytes + half)),
            bytes_by_array={METADATA: metadata} | {array: round(size) for array, size in by_array.items()},
            store_bytes=round(shard_bytes + cost.commit_bytes * self._num_shards + self._vision_bytes),
            worker_seconds=seconds,
            wall_seconds=self._load_seconds + seconds * self._longest_share,
        )

    def _worker_seconds(self, cost: CodecCost) -> float:
        teacher = self._teacher_seconds * self._held.num_samples
        num_maps = self._held.per_sample["maps"] * self._held.num_samples
        writing = self.writing_seconds(cost) * self._num_shards
        if self._on_gpu:
            # Coding and writing go on beside the teacher.
            return max(teacher, cost.coding_seconds * num_maps + writing)
        # The measured teacher coded in 16 bits; that took its part of the time.
        return teacher + (cost.coding_seconds - self._float16.coding_seconds) * num_maps + writing

    def _relative_error(self, cost: CodecCost) -> float:
        """Half the 95 % interval of the data's bytes, as a share of them."""
        blocks = self._held.blocks
        each = [predicted(cost.rates, block.counts) / block.num_read for block in blocks]
        mean = predicted(cost.rates, self._held.per_sample)
        if len(each) < 2 or not mean:
            return 0.0
        counts = statistics.stdev(each) / mean / math.sqrt(len(each))
        # Where the whole set was read, the counts are exact.
        counts *= math.sqrt(1 - self._held.num_read / self._held.num_samples)
        return student_t(len(each) - 1) * math.hypot(counts, cost.spread)


def answer_bytes(codec: LogitCodecConfig, num_rows: float, share_left: float) -> dict[int, int]:
    """Kept tokens -> bytes of all answer rows, where zstd leaves `share_left` of a record."""
    top_ks = sorted({min(top_k, codec.vocab_size) for top_k in (*TOP_KS, codec.top_k)})
    row_bytes = {top_k: codec.model_copy(update={"top_k": top_k}).row_bytes for top_k in top_ks}
    return {top_k: round(num_rows * share_left * size) for top_k, size in row_bytes.items()}


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
    z = 1.959963984540054
    terms: tuple[float, ...] = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / float(freedom) ** power for power, term in enumerate(terms, 1))
