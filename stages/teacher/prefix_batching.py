"""Conversations put together by what they begin with, so that the teacher reads it once for all of them."""

from collections.abc import Iterator
from dataclasses import dataclass

from stages.teacher.batching import (
    HELD_BATCHES,
    HELD_BYTES,
    LEAST_HELD,
    BatchSize,
    PreparedSample,
)


@dataclass(eq=False)
class PrefixGroup:
    """Samples with the same images and the same tokens up to the last of these."""

    first: PreparedSample
    """The one whose pixels are used; others have none."""
    samples: list[PreparedSample]
    """Those that are still to be run, in the order in which they came."""


@dataclass(frozen=True)
class PrefixBatch:
    """Groups whose prefixes have one padded length."""

    groups: list[PrefixGroup]


Batch = list[PreparedSample] | PrefixBatch
"""Samples of one padded length, or groups."""


def num_samples_of(batch: Batch) -> int:
    """All samples that are run in it."""
    return sum(len(group.samples) for group in batch.groups) if isinstance(batch, PrefixBatch) else len(batch)


class PrefixBatcher:
    """Collects samples with images into groups, and groups by the padded length of their prefix into batches.

    In a tar, conversations about one image lie side by side. So a batch is given away when a group comes that has no
    place in it, not when its last one begins. Samples that come later all the same make a group of their own: their
    prefix is then computed again, to the same bytes.
    """

    def __init__(self, size: BatchSize) -> None:
        self._size = size
        self._held: dict[int, dict[tuple[object, ...], PrefixGroup]] = {}

    def add(self, sample: PreparedSample) -> PrefixBatch | None:
        """A batch that is full, or the fullest when too much is held; None when neither."""
        # With the rows of answers in it: a text that reads like a template can make the same tokens and another mask.
        key = (sample.map_key, sample.answers_in_prefix)
        of_length = self._held.get(sample.padded_prefix, {})
        if key in of_length:
            of_length[key].samples.append(sample)
            sample.encoded.pixel_inputs.clear()
            return None
        ready = None
        if len(of_length) >= self._size.value:
            ready = self._pop(sample.padded_prefix)
        elif self._holds_too_much():
            ready = self._pop(max(self._held, key=lambda length: (len(self._held[length]), length)))
        self._held.setdefault(sample.padded_prefix, {})[key] = PrefixGroup(sample, [sample])
        return ready

    def rest(self) -> Iterator[PrefixBatch]:
        """What is still held, the longest first."""
        for length in sorted(self._held, reverse=True):
            yield self._pop(length)

    def _pop(self, length: int) -> PrefixBatch:
        return PrefixBatch(list(self._held.pop(length).values()))

    def _holds_too_much(self) -> bool:
        groups = [group for of_length in self._held.values() for group in of_length.values()]
        if len(groups) >= max(HELD_BATCHES * self._size.value, LEAST_HELD):
            return True
        return sum(pixels.nbytes for one in groups for pixels in one.first.encoded.pixel_inputs.values()) >= HELD_BYTES
