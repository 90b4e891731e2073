"""What a sample set holds, from a random sample of it: usable samples, tokens, answer rows, distinct maps."""

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from stages.conversations.encoder import ConversationEncoder
from stages.estimate.report import EstimateConfig
from stages.teacher.batching import PreparedSample, SamplePreparer
from stages.teacher.image_rules import ImageRules
from stages.teacher.timings import Timings
from storage.codecs.answer_attention import num_answers
from storage.codecs.codec_settings import num_entries
from storage.errors import UserError
from storage.progress import SILENT, Progress
from storage.samples.index import SampleIndex
from storage.samples.members import StoredSample
from storage.samples.sample_set import SampleSet
from storage.targets.commits import SkippedSample

UNITS = {
    "samples": "SU",
    "tokens": "T",
    "answer_rows": "R",
    "answer_keys": "H",
    "maps": "M",
    "image_tokens": "NX",
    "map_entries": "CYG",
    "repeated_tokens": "",
}
"""What bytes grow with -> letters of `storage.targets.layout` that count it. Maps, image tokens and map entries are
counted once for all samples that share a map. Where maps are of cells, image tokens are cells; what grows with the
tokens in them is measured by cells too. Answer keys are the image tokens of a sample, for each of its answers. No bytes
grow with repeated tokens: those up to a sample's last image that another sample has as well."""

Counts = Mapping[str, float]
"""Amount of each of `UNITS`."""


def count_units(
    tokens: Sequence[float],
    answer_rows: Sequence[float],
    answer_keys: Sequence[float],
    maps: Sequence[tuple[float, int]],
    repeated_tokens: Sequence[float] = (),
    *,
    causal: bool,
) -> Counts:
    """Counts of samples by what each has of a unit; a map is how much of it counts and its N."""
    return {
        "samples": len(tokens),
        "tokens": sum(tokens),
        "answer_rows": sum(answer_rows),
        "answer_keys": sum(answer_keys),
        "maps": sum(share for share, _ in maps),
        "image_tokens": sum(share * num_tokens for share, num_tokens in maps),
        "map_entries": sum(share * num_entries(num_tokens, causal) for share, num_tokens in maps),
        "repeated_tokens": sum(repeated_tokens),
    }


@dataclass(frozen=True)
class SampledBlock:
    """A block of consecutive samples, read and tokenised."""

    num_read: int
    counts: Counts
    cuts: Sequence[int]
    """Answer tokens that each usable sample lost to `max_length`, where it lost any."""
    skipped: Sequence[SkippedSample]
    kept: Sequence[StoredSample]
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

    @property
    def cuts(self) -> list[int]:
        """Answer tokens that were lost by each of these that lost any."""
        return [lost for block in self.blocks for lost in block.cuts]


def plan_blocks(num_samples: int, config: EstimateConfig) -> list[range]:
    """Blocks of consecutive sample numbers, one with a random start from each of some equal parts of the set.

    If as many samples are asked for as there are, the blocks are the whole set.

    Raises:
        UserError: If the set is empty.
    """
    if not num_samples:
        raise UserError("the sample set is empty, so there is nothing to estimate; pack samples first")
    rng = random.Random(config.seed)  # noqa: S311
    num_blocks = min(config.num_blocks, num_samples)
    blocks = []
    for first, end in itertools.pairwise(num_samples * part // num_blocks for part in range(num_blocks + 1)):
        length = min(-(-config.num_sampled // num_blocks), end - first)
        start = rng.randint(first, end - length)
        blocks.append(range(start, start + length))
    return blocks


def count_blocks(
    samples: SampleSet,
    encoder: ConversationEncoder,
    planned: Sequence[range],
    *,
    causal: bool,
    rules: ImageRules | None = None,
    num_kept: int = 0,
    progress: Progress = SILENT,
) -> SetCounts:
    """Reads and tokenises the samples of each block; the blocks keep `num_kept` of them, if so many are usable.

    Where g samples of a shard share a map, each counts 1/g of it. The samples beside the block's ends are read for
    this, so that a block that begins among conversations about one image does not count a map too many.
    """
    task = progress.task("count", sum(map(len, planned)))
    blocks = []
    for numbers in planned:
        # Of each usable sample only these numbers: a whole set may be counted.
        tokens: list[int] = []
        answer_rows: list[int] = []
        answer_keys: list[int] = []
        maps: list[tuple[float, int]] = []
        repeated: list[float] = []
        cuts: list[int] = []
        skipped: list[SkippedSample] = []
        kept: list[StoredSample] = []
        for shard_number, rows in rows_of(samples.index, numbers):
            with samples.shard(shard_number) as shard:
                prepare = SamplePreparer(encoder, shard, Timings(), rules)
                usable: list[PreparedSample] = []
                for row in rows:
                    task.advance()
                    stored = shard.read(row)
                    found = prepare.make(row, stored)
                    if isinstance(found, SkippedSample):
                        skipped.append(found)
                        continue
                    found.encoded.pixel_inputs.clear()
                    usable.append(found)
                    if len(kept) < -(-num_kept // len(planned)):
                        kept.append(stored)
                each = [sample.encoded for sample in usable]
                tokens += [len(one.token_ids) for one in each]
                answer_rows += [int(one.answer_mask.sum()) for one in each]
                answer_keys += [num_answers(one.encoded.answer_mask) * one.num_map_tokens for one in usable]
                cuts += [one.num_cut_answer_tokens for one in each if one.num_cut_answer_tokens]
                shares = _shares(prepare, len(shard), usable)
                maps += [(share, one.num_map_tokens) for share, one in zip(shares, usable, strict=True)]
                repeated += [(1 - share) * one.prefix_length for share, one in zip(shares, usable, strict=True)]
        counts = count_units(tokens, answer_rows, answer_keys, maps, repeated, causal=causal)
        blocks.append(SampledBlock(len(numbers), counts, cuts, skipped, kept))
    num_read = sum(map(len, planned))
    per_sample = {unit: sum(block.counts[unit] for block in blocks) / num_read for unit in UNITS}
    return SetCounts([entry.num_samples for entry in samples.index.shards], per_sample, blocks, samples.store.url)


def _shares(prepare: SamplePreparer, num_rows: int, samples: Sequence[PreparedSample]) -> list[float]:
    """For each sample 1/g, where g samples of its shard share its map; 0 without an image."""
    sizes = Counter(sample.map_key for sample in samples)
    ends = [(one, range(one.row - 1, -1, -1)) for one in samples[:1]]
    ends += [(one, range(one.row + 1, num_rows)) for one in samples[-1:]]
    for sample, outwards in ends:
        # Samples that share a map lie side by side.
        same = (getattr(prepare(row), "map_key", None) == sample.map_key for row in outwards if sample.map_key)
        sizes[sample.map_key] += sum(itertools.takewhile(bool, same))
    return [0.0 if sample.map_key is None else 1 / sizes[sample.map_key] for sample in samples]


def rows_of(index: SampleIndex, numbers: range) -> Iterator[tuple[int, range]]:
    """Numbers of the shards of a block of the whole set, and its rows in each."""
    first = 0
    for number, entry in enumerate(index.shards):
        rows = range(max(numbers.start - first, 0), min(numbers.stop - first, entry.num_samples))
        if rows:
            yield number, rows
        first += entry.num_samples
