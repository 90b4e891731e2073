"""What a sample set holds, from a random sample of it: usable samples, tokens, answer rows, distinct maps."""

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from stages.conversations.encoder import ConversationEncoder
from stages.estimate.report import EstimateConfig
from stages.teacher.batching import PreparedSample, SamplePreparer
from stages.teacher.timings import Timings
from storage.codecs.config import num_entries
from storage.errors import UserError
from storage.progress import SILENT, Progress
from storage.samples.index import SampleIndex
from storage.samples.members import StoredSample
from storage.samples.sample_set import SampleSet
from storage.targets.commits import SkippedSample

UNITS = {"samples": "SU", "tokens": "T", "answer_rows": "R", "maps": "M", "image_tokens": "N", "map_entries": "CYG"}
"""What bytes grow with -> letters of `storage.targets.layout` that count it. The last three are counted once for all
samples that share a map."""

Counts = Mapping[str, float]
"""Amount of each of `UNITS`."""


@dataclass(frozen=True)
class SampledBlock:
    """A block of consecutive samples, read and tokenised."""

    num_read: int
    counts: Counts
    skipped: tuple[SkippedSample, ...]
    kept: tuple[StoredSample, ...]
    """The first usable samples, as many as were asked for."""


@dataclass(frozen=True)
class SetCounts:
    """The size of a sample set, and what a sample of it holds on average."""

    shard_sizes: Sequence[int]
    """Samples of each shard."""
    per_sample: Counts
    blocks: Sequence[SampledBlock] = ()
    """What was read of it; nothing where `per_sample` is assumed."""
    url: str | None = None

    @property
    def num_samples(self) -> int:
        """Samples of the whole set."""
        return sum(self.shard_sizes)

    @property
    def num_read(self) -> int:
        """Samples that were read and tokenised."""
        return sum(block.num_read for block in self.blocks)

    @property
    def skipped(self) -> list[SkippedSample]:
        """Samples of these that cannot be used."""
        return [skipped for block in self.blocks for skipped in block.skipped]


def sample_set(
    samples: SampleSet,
    encoder: ConversationEncoder,
    config: EstimateConfig,
    *,
    causal: bool,
    num_kept: int = 0,
    progress: Progress = SILENT,
) -> SetCounts:
    """Reads and tokenises a random sample of a sample set; see `plan_blocks` and `count_blocks`.

    Raises:
        UserError: If the set is empty.
    """
    index = samples.index
    planned = plan_blocks(index.num_samples, config.num_blocks, config.num_sampled, config.seed)
    kept_per_block = -(-num_kept // len(planned))
    blocks = count_blocks(samples, encoder, planned, causal=causal, num_kept=kept_per_block, progress=progress)
    num_read = sum(block.num_read for block in blocks)
    per_sample = {unit: sum(block.counts[unit] for block in blocks) / num_read for unit in UNITS}
    return SetCounts([entry.num_samples for entry in index.shards], per_sample, blocks, samples.store.url)


def plan_blocks(num_samples: int, num_blocks: int, num_sampled: int, seed: int) -> list[range]:
    """Blocks of consecutive sample numbers, one with a random start from each of `num_blocks` equal parts of the set.

    With `num_sampled` of at least `num_samples` they are the whole set.

    Raises:
        UserError: If the set is empty.
    """
    if not num_samples:
        raise UserError("the sample set is empty, so there is nothing to estimate; pack samples first")
    rng = random.Random(seed)  # noqa: S311
    num_blocks = min(num_blocks, num_samples)
    bounds = [num_samples * part // num_blocks for part in range(num_blocks + 1)]
    blocks = []
    for first, end in itertools.pairwise(bounds):
        length = min(-(-num_sampled // num_blocks), end - first)
        start = rng.randint(first, end - length)
        blocks.append(range(start, start + length))
    return blocks


def count_blocks(
    samples: SampleSet,
    encoder: ConversationEncoder,
    planned: Sequence[range],
    *,
    causal: bool,
    num_kept: int = 0,
    progress: Progress = SILENT,
) -> list[SampledBlock]:
    """Reads and tokenises the samples of each block.

    Where g samples of a shard share a map, each counts 1/g of it. The samples beside the block's ends are read for
    this, so that a block that begins among conversations about one image does not count a map too many.
    """
    task = progress.task("count", sum(map(len, planned)))
    blocks = []
    for numbers in planned:
        counts = dict.fromkeys(UNITS, 0.0)
        skipped: list[SkippedSample] = []
        kept: list[StoredSample] = []
        for shard_number, rows in _by_shard(samples.index, numbers):
            with samples.shard(shard_number) as shard:
                prepare = SamplePreparer(encoder, shard, Timings())
                usable = []
                for row in rows:
                    found = prepare(row)
                    if isinstance(found, SkippedSample):
                        skipped.append(found)
                    else:
                        found.encoded.pixel_inputs.clear()
                        usable.append(found)
                        if len(kept) < num_kept:
                            kept.append(shard.read(row))
                    task.advance()
                shares = _shares(prepare, len(shard), usable)
            for sample, share in zip(usable, shares, strict=True):
                num_tokens = len(sample.encoded.image_positions)
                counts["samples"] += 1
                counts["tokens"] += len(sample.encoded.token_ids)
                counts["answer_rows"] += int(sample.encoded.answer_mask.sum())
                counts["maps"] += share
                counts["image_tokens"] += share * num_tokens
                counts["map_entries"] += share * num_entries(num_tokens, causal)
        blocks.append(SampledBlock(len(numbers), counts, tuple(skipped), tuple(kept)))
    return blocks


def _shares(prepare: SamplePreparer, num_rows: int, samples: Sequence[PreparedSample]) -> list[float]:
    """For each sample 1/g, where g samples of its shard share its map; 0 without an image."""
    sizes = Counter(sample.map_key for sample in samples)
    if samples:
        sizes[samples[0].map_key] += _neighbours(prepare, range(samples[0].row - 1, -1, -1), samples[0].map_key)
        sizes[samples[-1].map_key] += _neighbours(prepare, range(samples[-1].row + 1, num_rows), samples[-1].map_key)
    return [0.0 if sample.map_key is None else 1 / sizes[sample.map_key] for sample in samples]


def _neighbours(prepare: SamplePreparer, rows: range, key: str | None) -> int:
    """Number of samples with this map from the first row on; such samples lie side by side."""
    same = (getattr(prepare(row), "map_key", None) == key for row in rows if key is not None)
    return sum(1 for _ in itertools.takewhile(bool, same))


def _by_shard(index: SampleIndex, numbers: range) -> Iterator[tuple[int, range]]:
    """Numbers of the shards of a block of the whole set, and its rows in each."""
    first = 0
    for number, entry in enumerate(index.shards):
        rows = range(max(numbers.start - first, 0), min(numbers.stop - first, entry.num_samples))
        if rows:
            yield number, rows
        first += entry.num_samples
