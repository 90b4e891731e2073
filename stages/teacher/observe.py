"""What the teacher says of the samples of one shard: tokens, attention maps, answer logits.

Three things go on at once: threads make samples ready (`ahead.py`), one batch is in the teacher (`forward.py`), and
a thread codes the maps of the batch before.

Shape letters: L captured layers, W windows, N image tokens.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, TypeGuard

import torch
from torch import Tensor

from stages.teacher.batching import LengthBatcher, PreparedSample, SamplePreparer, prefetch
from stages.teacher.forward import BatchSize, Observed, run_teacher
from stages.teacher.teacher import Teacher
from stages.teacher.timings import Timings
from storage.codecs.maps import EncodedMaps
from storage.samples.shard import SampleShard
from storage.targets.sample_targets import SampleTargets, SkippedSample

UNCODED_BATCHES = 2  # batches whose uncoded maps may wait, `[L, N, N]` float32 a map, on the teacher's device
PREPARING_THREADS = 4

_FAULTS = {
    "not_finite": "the teacher's attention or logits hold NaN or infinity",
    "out_of_memory": "the sample alone does not fit into the GPU's memory; lower max_length or take a larger GPU",
}


@dataclass
class ShardObservations:
    """Everything `storage.targets.write_shard` needs of one shard, rows in the order of its tar."""

    samples: list[SampleTargets] = field(default_factory=list)
    maps: list[EncodedMaps] = field(default_factory=list)
    skipped: list[SkippedSample] = field(default_factory=list)


class Observer:
    """A teacher at work; several threads may each give it a shard.

    One shard has the teacher at a time. The others make their first batch ready meanwhile, and whoever had it before
    codes its last batches and is free to write.

    Args:
        teacher: the loaded teacher.
        overlap: False does one thing after the other, in one thread; what comes out is the same.
        timings: where its time is counted; None is its own.
    """

    def __init__(self, teacher: Teacher, *, overlap: bool = True, timings: Timings | None = None) -> None:
        self.teacher = teacher
        self.timings = timings or Timings()
        on_gpu = teacher.model.device.type == "cuda"
        self.batch_size = BatchSize(teacher.identity.settings.batch_size, on_gpu=on_gpu)
        self._turn = threading.Lock()
        self._uncoded: deque[list[Future[EncodedMaps | None]]] = deque()
        self._preparing = ThreadPoolExecutor(PREPARING_THREADS, "prepare") if overlap else None
        self._coding = ThreadPoolExecutor(1, "code") if overlap else None
        self._coding_stream = torch.cuda.Stream(teacher.model.device) if on_gpu else None  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends its threads."""
        for pool in (self._preparing, self._coding):
            if pool is not None:
                pool.shutdown(cancel_futures=True)

    def observe(self, shard: SampleShard, progress: Callable[[int], None] | None = None) -> ShardObservations:
        """Runs the teacher over one sample shard.

        A map is computed once for each distinct (image, tokens up to the image's end): under causal attention later
        tokens cannot change it. What cannot be used is in `skipped` with its reason.

        Memory: the coded targets of the shard, a bounded number of batches of samples that wait (`ahead.py`), and
        the uncoded maps of `UNCODED_BATCHES` + 1 batches.

        Args:
            shard: the sample shard.
            progress: called with the number of samples finished since the last call.

        Raises:
            UserError: a batch does not fit into memory and its size was set.
        """
        work = ShardWork(self, SamplePreparer(self.teacher.encoder, shard, self.timings), progress or (lambda _: None))
        with closing(work.batches(len(shard))) as batches:
            first = list(itertools.islice(batches, 1))
            with self._turn:
                for batch in itertools.chain(first, batches):
                    work.run(batch)
                work.run_orphans()
        return work.finish()

    def code(self, batch: Sequence[tuple[Tensor, ...]]) -> "list[Future[EncodedMaps | None]]":
        """Codes of each image's maps, made beside the next forward pass; None for maps that are not finite.

        Only for whoever has the turn.
        """
        self.wait_for_coding(UNCODED_BATCHES - 1)
        coding = [self._start_coding(maps) for maps in batch]
        self._uncoded.append(coding)
        return coding

    def wait_for_coding(self, num_batches: int) -> None:
        """Until no more than that many batches hold memory of the teacher's device."""
        while len(self._uncoded) > num_batches:
            wait(self._uncoded.popleft())

    def try_out(self, sample: PreparedSample) -> None:
        """Runs the teacher on one sample for nothing but to see whether it can."""
        run_teacher(self.teacher, [sample], ())

    def prefetch(self, maker: SamplePreparer, num_rows: int) -> Generator[PreparedSample | SkippedSample, None, None]:
        """The shard's rows in order."""
        return prefetch(maker, num_rows, self._preparing, self.batch_size)

    def _start_coding(self, maps: tuple[Tensor, ...]) -> "Future[EncodedMaps | None]":
        if self._coding is not None:
            return self._coding.submit(self._code, maps)
        done: Future[EncodedMaps | None] = Future()
        done.set_result(self._code(maps))
        return done

    def _code(self, maps: tuple[Tensor, ...]) -> EncodedMaps | None:
        stream = nullcontext() if self._coding_stream is None else torch.cuda.stream(self._coding_stream)
        with torch.inference_mode(), stream, self.timings.measured("coding"):
            if not all(bool(torch.isfinite(map_NN).all()) for map_NN in maps):
                return None
            try:
                return encode_targets(self.teacher, torch.stack(maps))
            except torch.OutOfMemoryError:
                # The next batch has the GPU's memory; the CPU is slower, and nobody waits.
                return encode_targets(self.teacher, torch.stack([map_NN.cpu() for map_NN in maps]))


@dataclass
class _Outcome:
    """One sample, once the teacher has seen it."""

    sample: PreparedSample
    logits_RQ: Tensor | None = None
    fault: str | None = None


class ShardWork:
    """The state of one shard on its way through the teacher."""

    def __init__(self, observer: Observer, maker: SamplePreparer, progress: Callable[[int], None]) -> None:
        self._observer, self._maker, self._progress = observer, maker, progress
        self._skipped: list[SkippedSample] = []
        self._owners: dict[str, PreparedSample] = {}
        self._maps: dict[str, Future[EncodedMaps | None]] = {}
        self._outcomes: dict[int, _Outcome] = {}

    def batches(self, num_rows: int) -> Generator[list[PreparedSample], None, None]:
        """The shard's samples in batches; the first in the tar that needs a map becomes its owner."""
        batcher = LengthBatcher(self._observer.batch_size)
        with closing(self._observer.prefetch(self._maker, num_rows)) as samples:
            for sample in samples:
                if not self.admit(sample):
                    continue
                if (batch := batcher.add(sample)) is not None:
                    yield batch
        yield from batcher.rest()

    def admit(self, sample: PreparedSample | SkippedSample) -> TypeGuard[PreparedSample]:
        """Whether the sample goes to the teacher; one that does not is in the ledger from now on."""
        if isinstance(sample, SkippedSample):
            self._skipped.append(sample)
            self._progress(1)
            return False
        if sample.map_key is not None:
            self._owners.setdefault(sample.map_key, sample)
        return True

    def forget(self, sample: PreparedSample) -> None:
        """As if it had never come; the next that needs its map becomes the map's owner."""
        self._outcomes.pop(sample.row, None)
        if sample.map_key is not None and self._owners.get(sample.map_key) is sample:
            del self._owners[sample.map_key]

    def run(self, batch: Sequence[PreparedSample]) -> None:
        """Runs samples of one padded length, in parts if they do not fit into memory together."""
        waiting = deque(batch)
        while waiting:
            part = [waiting.popleft() for _ in range(min(self._observer.batch_size.value, len(waiting)))]
            if self._run_part(part):
                self._progress(len(part))
            else:
                waiting.extendleft(reversed(part))

    def run_orphans(self) -> None:
        """Maps whose owner did not fit into memory are taken of the next sample that shares them and does."""
        for key, owner in list(self._owners.items()):
            if self._outcomes[owner.row].fault != "out_of_memory":
                continue
            for row, outcome in sorted(self._outcomes.items()):
                if outcome.sample.map_key == key and outcome.fault is None and key not in self._maps:
                    again = self._maker(row)
                    assert isinstance(again, PreparedSample)
                    self._owners[key] = again
                    self._run_part([again])
                    self._outcomes[row] = outcome

    def finish(self) -> ShardObservations:
        """Waits for the coding; rows in tar order, maps numbered by first use."""
        result = ShardObservations(skipped=self._skipped)
        map_rows: dict[str, int] = {}
        for _, outcome in sorted(self._outcomes.items()):
            sample, key = outcome.sample, outcome.sample.map_key
            coded = self._maps[key].result() if key in self._maps else None
            fault = outcome.fault
            if key is not None and coded is None and fault is None:
                fault = "not_finite" if key in self._maps else "out_of_memory"
            if fault is not None or outcome.logits_RQ is None:
                reason = fault or "not_finite"
                result.skipped.append(SkippedSample(sample.key, sample.id, reason, _FAULTS[reason]))
                continue
            if key is not None and coded is not None and key not in map_rows:
                map_rows[key] = len(result.maps)
                result.maps.append(coded)
            result.samples.append(
                SampleTargets(
                    key=sample.key,
                    token_ids=sample.token_ids.to(torch.int32),
                    answer_mask=sample.answer_mask,
                    map_row=None if key is None else map_rows[key],
                    logits_RQ=outcome.logits_RQ,
                )
            )
        result.skipped.sort(key=lambda skipped: skipped.key)
        return result

    def _run_part(self, part: Sequence[PreparedSample]) -> bool:
        """One forward pass; False if it must be tried again with fewer samples."""
        observer = self._observer
        observed = self._attempt(part)
        if observed is None and len(part) > 1:
            observer.batch_size.shrink(len(part))
            return False
        if observed is None:
            # Alone, and once more when nothing else of ours is in memory.
            observer.wait_for_coding(0)
            observed = self._attempt(part)
        if observed is None:
            self._outcomes[part[0].row] = _Outcome(part[0], fault="out_of_memory")
        else:
            observer.batch_size.fitted(len(part))
            self._keep(observed)
        for sample in part:
            sample.pixel_inputs = {}
        return True

    def _attempt(self, part: Sequence[PreparedSample]) -> list[Observed] | None:
        owned = {sample for sample in part if sample.map_key and self._owners[sample.map_key] is sample}
        try:
            with self._observer.timings.forward():
                return run_teacher(self._observer.teacher, part, owned)
        except torch.OutOfMemoryError:
            pass
        # Here and not in the handler, where the exception still holds the forward pass's tensors.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _keep(self, observed: Sequence[Observed]) -> None:
        for one in observed:
            self._outcomes[one.sample.row] = _Outcome(one.sample, one.logits_RQ)
        taken = {one.sample.map_key: one.maps for one in observed if one.sample.map_key and one.maps}
        self._maps.update(zip(taken, self._observer.code(list(taken.values())), strict=True))


def observe_shard(
    teacher: Teacher, shard: SampleShard, progress: Callable[[int], None] | None = None
) -> ShardObservations:
    """As `Observer.observe`, for one shard alone."""
    with Observer(teacher) as observer:
        return observer.observe(shard, progress)


def encode_targets(teacher: Teacher, maps_LNN: Tensor) -> EncodedMaps:
    """Codes of each layer, and what makes the windows exact, coded where the maps are."""
    return teacher.identity.map_codec.encode(maps_LNN).to(torch.device("cpu"))
