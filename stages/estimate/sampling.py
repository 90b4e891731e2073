"""What a sample set holds, from a seeded draw: usable samples, tokens, answer rows, distinct maps.

Letters: N image tokens.
"""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from stages.conversations import ConversationEncoder
from stages.teacher.batching import PreparedSample, SamplePreparer
from stages.teacher.timings import Timings
from storage.codecs.config import num_entries
from storage.errors import UserError
from storage.samples.index import SampleIndex
from storage.samples.members import StoredSample
from storage.samples.shard import SampleShard
from storage.stores import Store
from storage.targets.sample_targets import SkippedSample

UNITS = ("samples", "tokens", "answer_rows", "maps", "image_tokens", "map_entries")
"""What bytes grow with. The last three are counted once for all samples that share a map."""

Counts = Mapping[str, float]
"""Amount of each of `UNITS`."""


@dataclass(frozen=True)
class CountedRun:
    """A run of consecutive samples, read and tokenised."""

    num_read: int
    counts: Counts
    skipped: tuple[SkippedSample, ...]
    kept: tuple[StoredSample, ...]
    """The first usable samples, as many as were asked for."""


def plan_runs(num_samples: int, num_runs: int, num_counted: int, seed: int) -> list[range]:
    """Runs of sample numbers, one from each of `num_runs` equal parts of the set, its start drawn.

    With `num_counted` of at least `num_samples` they are the whole set.

    Raises:
        UserError: the set is empty.
    """
    if not num_samples:
        raise UserError("the sample set is empty, so there is nothing to estimate; pack samples first")
    rng = random.Random(seed)  # noqa: S311
    num_runs = min(num_runs, num_samples)
    bounds = [num_samples * part // num_runs for part in range(num_runs + 1)]
    runs = []
    for first, end in itertools.pairwise(bounds):
        length = min(-(-num_counted // num_runs), end - first)
        start = rng.randint(first, end - length)
        runs.append(range(start, start + length))
    return runs


def count_runs(
    store: Store,
    index: SampleIndex,
    encoder: ConversationEncoder,
    runs: Sequence[range],
    *,
    causal: bool,
    num_kept: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[CountedRun]:
    """Reads and tokenises the samples of each run.

    A sample counts one part in g of its map, where g samples of its shard share it: those beside the run's ends are
    looked at for this, so that a run that begins among conversations about one image counts no map too many.

    Args:
        store: the sample set.
        index: its index.
        encoder: the teacher's.
        runs: as `plan_runs` makes them.
        causal: whether half of a map is stored.
        num_kept: usable samples of each run to give back.
        progress: called with the number of samples read since the last call.
    """
    counted = []
    for run in runs:
        counts = dict.fromkeys(UNITS, 0.0)
        skipped: list[SkippedSample] = []
        kept: list[StoredSample] = []
        for number, rows in _by_shard(index, run):
            with SampleShard.open(store, index.shards[number]) as shard:
                make = SamplePreparer(encoder, shard, Timings())
                usable = []
                for row in rows:
                    found = make(row)
                    if isinstance(found, SkippedSample):
                        skipped.append(found)
                    else:
                        found.pixel_inputs = {}
                        usable.append(found)
                        if len(kept) < num_kept:
                            kept.append(shard.read(row))
                    if progress is not None:
                        progress(1)
                for sample, share in zip(usable, _shares(make, len(shard), usable), strict=True):
                    _add(counts, sample, share, causal)
        counted.append(CountedRun(len(run), counts, tuple(skipped), tuple(kept)))
    return counted


def _add(counts: dict[str, float], sample: PreparedSample, share: float, causal: bool) -> None:
    num_tokens = len(sample.image_positions)
    counts["samples"] += 1
    counts["tokens"] += len(sample.token_ids)
    counts["answer_rows"] += int(sample.answer_mask.sum())
    counts["maps"] += share
    counts["image_tokens"] += share * num_tokens
    counts["map_entries"] += share * num_entries(num_tokens, causal)


def _shares(make: SamplePreparer, num_rows: int, samples: Sequence[PreparedSample]) -> list[float]:
    """Of each sample one over the samples of its shard that share its map; 0 without an image."""
    sizes = Counter(sample.map_key for sample in samples)
    if samples:
        sizes[samples[0].map_key] += _neighbours(make, range(samples[0].row - 1, -1, -1), samples[0].map_key)
        sizes[samples[-1].map_key] += _neighbours(make, range(samples[-1].row + 1, num_rows), samples[-1].map_key)
    return [0.0 if sample.map_key is None else 1 / sizes[sample.map_key] for sample in samples]


def _neighbours(make: SamplePreparer, rows: range, key: str | None) -> int:
    """Samples with this map from the first row on; they lie side by side."""
    number = 0
    for row in rows if key is not None else ():
        found = make(row)
        if isinstance(found, SkippedSample) or found.map_key != key:
            break
        number += 1
    return number


def _by_shard(index: SampleIndex, run: range) -> Iterator[tuple[int, range]]:
    first = 0
    for number, entry in enumerate(index.shards):
        start, stop = max(run.start - first, 0), min(run.stop - first, entry.num_samples)
        if start < stop:
            yield number, range(start, stop)
        first += entry.num_samples
