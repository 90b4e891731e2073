"""Samples of a shard prepared before the teacher needs them, and put into batches of one padded length.

Which samples make a batch follows from the shard's content and the batch size, never from timing.
"""

import hashlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.conversations.encoder import ConversationEncoder, EncodedConversation
from stages.images import read_picture
from stages.teacher.image_rules import ImageRules
from stages.teacher.timings import Timings
from stages.unusable_sample import Reason, UnusableSample
from storage.codecs.token_cells import num_cells_of
from storage.errors import UserError
from storage.samples.members import StoredSample
from storage.samples.shard_reader import SampleShard
from storage.targets.commits import SkippedSample

logger = logging.getLogger(__name__)

CPU_BATCH = 8
GPU_FIRST_TRY = 64
LENGTH_STEP = 32
"""Rows are padded to a multiple of this, whatever else is in their batch: a sample is computed in the same shapes alone
and in company, which on a CPU makes the bytes the same."""

PART_STEP, LEAST_PART = 16, 32
"""As `LENGTH_STEP`, and the least, for a prefix and what follows it: with two parts there is padding twice."""

HELD_BATCHES = 4
"""Batches' worth of samples that may wait for others of their length."""
LEAST_HELD = 64
HELD_BYTES = 512 * 2**20
"""Pixels of the samples that may wait."""
PREFETCHED_BATCHES = 2
"""Batches' worth of samples that are prepared while the teacher runs."""


@dataclass(eq=False)
class PreparedSample:
    """One sample as the teacher reads it, and what became of it there."""

    row: int
    """Its row in the tar."""
    key: str
    id: str
    encoded: EncodedConversation
    """The pixels in it are dropped once the teacher has seen them."""
    map_key: str | None
    """Digest of all that its maps depend on; None without an image."""
    is_turned: bool = False
    """Whether EXIF data ask for a turn of one of the pictures that it was read with."""
    cells_X: Tensor | None = None
    """int32, the cell of each image token, where maps are of cells; None without an image."""
    may_share_images: bool = False
    """Whether a sample beside it in the tar seems to be about the same images."""
    logits_RQ: Tensor | None = None
    """Records of its answer rows, once the teacher has run; None where a row is not finite."""
    answer_attention_LaN: Tensor | None = None
    """float16, mean attention from each answer to the image, once the teacher has run; None where none is wanted."""
    fault: Reason | None = None
    """Why the teacher could not run."""

    @property
    def padded_length(self) -> int:
        """T of its batch."""
        return _rounded_up(len(self.encoded.token_ids), LENGTH_STEP)

    @property
    def prefix_length(self) -> int:
        """Tokens up to its last image token, with that; 0 without an image."""
        positions_N = self.encoded.image_positions
        return int(positions_N[-1]) + 1 if len(positions_N) else 0

    @property
    def num_map_tokens(self) -> int:
        """N of its map: image tokens, or cells of them."""
        return len(self.encoded.image_positions) if self.cells_X is None else num_cells_of(self.cells_X)

    @property
    def padded_prefix(self) -> int:
        """T of the batch of its prefix."""
        return _rounded_up(max(LEAST_PART, self.prefix_length), PART_STEP)

    @property
    def padded_rest(self) -> int:
        """T of the batch of what follows its prefix, also where nothing does."""
        return _rounded_up(max(LEAST_PART, len(self.encoded.token_ids) - self.prefix_length), PART_STEP)

    @property
    def answers_in_prefix(self) -> tuple[int, ...]:
        """Positions of the prefix that predict an answer's token."""
        return tuple((self.encoded.answer_mask[: self.prefix_length + 1].nonzero()[:, 0] - 1).tolist())


def _rounded_up(num_tokens: int, step: int) -> int:
    return -(-num_tokens // step) * step


class SamplePreparer:
    """Reads, decodes and tokenizes one row of a shard; for several threads at once."""

    def __init__(
        self, encoder: ConversationEncoder, shard: SampleShard, timings: Timings, rules: ImageRules | None = None
    ) -> None:
        self._encoder, self._shard, self._timings, self._rules = encoder, shard, timings, rules

    def __call__(self, row: int) -> PreparedSample | SkippedSample:
        """The sample, or why it cannot be used."""
        return self.make(row, self._shard.read(row))

    def make(self, row: int, sample: StoredSample) -> PreparedSample | SkippedSample:
        """As calling it, for a row that is read already."""
        with self._timings.measured("preparing"):
            name = str(sample.record.get("id", ""))
            try:
                exif = self._encoder.image_settings.exif
                pictures = [read_picture(data, exif=exif) for data in sample.images]
                images = [picture.image for picture in pictures]
                encoded = self._encoder.encode(sample.record["conversations"], images)
                cells_X = None if self._rules is None else self._rules.cells(encoded)
            except UnusableSample as error:
                return SkippedSample(key=sample.key, id=name, reason=error.reason, detail=error.detail)
            is_turned = any(picture.is_turned for picture in pictures[: encoded.num_images])
            may_share = self._shard.may_share_images(row)
            map_key = _map_key(sample, encoded)
            return PreparedSample(row, sample.key, name, encoded, map_key, is_turned, cells_X, may_share)


def _map_key(sample: StoredSample, encoded: EncodedConversation) -> str | None:
    if not len(encoded.image_positions):
        return None
    last = int(encoded.image_positions[-1])
    tokens = encoded.token_ids[: last + 1].to(torch.int64).numpy().tobytes()
    images = b"".join(hashlib.sha256(data).digest() for data in sample.images[: encoded.num_images])
    return hashlib.sha256(images + tokens).hexdigest()


class BatchSize:
    """Samples of one forward pass: as `wanted` by the settings, or on a GPU the largest power of two that fits."""

    def __init__(self, wanted: int | None, *, on_gpu: bool) -> None:
        self.value = wanted or (GPU_FIRST_TRY if on_gpu else CPU_BATCH)
        self.may_shrink = wanted is None
        self._settled = wanted is not None or not on_gpu
        self._lock = threading.Lock()

    def fitted(self, num_samples: int) -> None:
        """A batch went through; the first full one settles the size."""
        with self._lock:
            is_found = not self._settled and num_samples >= self.value
            self._settled = self._settled or is_found
        if is_found:
            logger.info("the teacher runs %d samples at a time, found by trying", self.value)

    def shrink(self, num_samples: int) -> None:
        """A batch of `num_samples` > 1 did not fit into memory: down to the next power of two.

        Raises:
            UserError: If the size was set: another one would change the bytes on a GPU.
        """
        if not self.may_shrink:
            raise UserError(
                f"a batch of {num_samples} samples does not fit into the GPU's memory; set teacher.batch_size below "
                f"{num_samples}, or leave it out to have it found"
            )
        self.value = min(self.value, 1 << (num_samples - 1).bit_length() - 1)
        self._settled = False


def prefetch(
    make: Callable[[int], PreparedSample | SkippedSample],
    num_rows: int,
    threads: ThreadPoolExecutor | None,
    size: BatchSize,
) -> Generator[PreparedSample | SkippedSample, None, None]:
    """All rows in order, prepared by `threads` a bounded number of rows ahead; without threads, each when asked for."""
    if threads is None:
        yield from map(make, range(num_rows))
        return
    waiting: deque[Future[PreparedSample | SkippedSample]] = deque()
    try:
        for row in range(num_rows):
            waiting.append(threads.submit(make, row))
            if len(waiting) > PREFETCHED_BATCHES * size.value:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


class LengthBatcher:
    """Collects samples by padded length into batches of `size`."""

    def __init__(self, size: BatchSize) -> None:
        self._size = size
        self._held: dict[int, list[PreparedSample]] = {}

    def add(self, sample: PreparedSample) -> list[PreparedSample] | None:
        """A batch that is now full, or the fullest when too much is held; None when neither."""
        group = self._held.setdefault(sample.padded_length, [])
        group.append(sample)
        if len(group) >= self._size.value:
            return self._held.pop(sample.padded_length)
        held = [one for group in self._held.values() for one in group]
        too_many = len(held) >= max(HELD_BATCHES * self._size.value, LEAST_HELD)
        if too_many or sum(pixels.nbytes for one in held for pixels in one.encoded.pixel_inputs.values()) >= HELD_BYTES:
            return self._held.pop(max(self._held, key=lambda length: (len(self._held[length]), length)))
        return None

    def rest(self) -> Iterator[list[PreparedSample]]:
        """What is still held, the longest first."""
        for length in sorted(self._held, reverse=True):
            yield self._held.pop(length)
