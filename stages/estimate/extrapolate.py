"""From bytes and seconds of a few samples to those of a whole extraction."""

import heapq
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stages.estimate.report import SettingEstimate
from stages.estimate.sampling import UNITS, CountedRun, Counts
from storage.codecs.config import LogitCodecConfig
from storage.samples.index import SampleIndex
from storage.targets.layout import ARRAYS

METADATA = "(metadata)"
TOP_KS = (16, 32, 48, 64, 128, 256)

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
class CodedProbe:
    """The probed samples as one codec stores them."""

    rates: Mapping[str, float]
    """Array -> bytes of one of its unit."""
    metadata_bytes: int
    """Of a shard, whatever is in it."""
    commit_bytes: int
    num_files: int
    spread: float
    """Standard error of the rates over the runs, as a share of them."""
    coding_seconds: float
    """For each map."""
    fixed_seconds: float
    """Writing a shard of nothing."""
    seconds_per_byte: float


def predicted(rates: Mapping[str, float], units: Counts) -> float:
    """Bytes of so many units."""
    return sum(rate * units[UNIT_OF_ARRAY[array]] for array, rate in rates.items())


class Scale:
    """From what was drawn to the whole set."""

    def __init__(
        self,
        index: SampleIndex,
        runs: Sequence[CountedRun],
        workers: int,
        *,
        on_gpu: bool,
        load_seconds: float,
        vision_bytes: int,
    ) -> None:
        self._runs, self._workers, self._on_gpu = runs, workers, on_gpu
        self._load_seconds, self._vision_bytes = load_seconds, vision_bytes
        self._longest_share = longest_share([entry.num_samples for entry in index.shards], workers)
        self.num_samples, self.num_shards = index.num_samples, len(index.shards)
        self.num_read = sum(run.num_read for run in runs)
        self.per_sample = {unit: sum(run.counts[unit] for run in runs) / self.num_read for unit in UNITS}

    def writing_seconds(self, coded: CodedProbe) -> float:
        """Of an average shard."""
        data = predicted(coded.rates, self.per_sample) * self.num_samples
        return coded.fixed_seconds + coded.seconds_per_byte * data / self.num_shards

    def setting(self, coded: CodedProbe, teacher_seconds: float, as_observed: CodedProbe) -> SettingEstimate:
        """The whole extraction with one codec.

        Args:
            coded: the probe in this codec.
            teacher_seconds: of a sample.
            as_observed: the probe in the codec that the teacher's time has in it.
        """
        by_array = {
            array: rate * self.per_sample[UNIT_OF_ARRAY[array]] * self.num_samples
            for array, rate in coded.rates.items()
        }
        data, metadata = sum(by_array.values()), coded.metadata_bytes * self.num_shards
        half = data * self._relative_error(coded)
        shard_bytes = data + metadata
        seconds = self._worker_seconds(coded, teacher_seconds, as_observed)
        return SettingEstimate(
            shard_bytes=round(shard_bytes),
            shard_bytes_95=(round(max(shard_bytes - half, 0)), round(shard_bytes + half)),
            bytes_by_array={METADATA: metadata} | {array: round(size) for array, size in by_array.items()},
            store_bytes=round(shard_bytes + coded.commit_bytes * self.num_shards + self._vision_bytes),
            worker_seconds=seconds,
            wall_seconds=self._load_seconds + seconds * self._longest_share,
        )

    def _worker_seconds(self, coded: CodedProbe, teacher_seconds: float, as_observed: CodedProbe) -> float:
        teacher = teacher_seconds * self.num_samples
        num_maps = self.per_sample["maps"] * self.num_samples
        writing = self.writing_seconds(coded) * self.num_shards
        if self._on_gpu:
            # Coding and writing go on beside the teacher.
            return max(teacher, coded.coding_seconds * num_maps + writing)
        # The probe's teacher coded in 16 bits; that took its part of the time.
        return teacher + (coded.coding_seconds - as_observed.coding_seconds) * num_maps + writing

    def _relative_error(self, coded: CodedProbe) -> float:
        """Half the 95 % interval of the data's bytes, as a share of them."""
        each = [predicted(coded.rates, run.counts) / run.num_read for run in self._runs]
        mean = predicted(coded.rates, self.per_sample)
        if len(each) < 2 or not mean:
            return 0.0
        counts = statistics.stdev(each) / mean / math.sqrt(len(each))
        # Of a set that was read whole the counts are no sample.
        counts *= math.sqrt(1 - self.num_read / self.num_samples)
        return student_t(len(each) - 1) * math.hypot(counts, coded.spread)


def answer_bytes(codec: LogitCodecConfig, num_rows: float, share_left: float) -> dict[int, int]:
    """Bytes of all answer rows by kept tokens; zstd leaves `share_left` of a record."""
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
