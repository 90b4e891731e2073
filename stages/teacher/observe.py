"""What the teacher says of the samples of one shard: tokens, attention maps, answer logits.

Three things go on at once: threads prepare samples (`batching.py`), one batch is in the teacher (`forward.py`), or of
a teacher over several GPUs a few (`in_flight.py`), and a thread codes the maps of the batch before (`map_coder.py`).
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import Self, TypeGuard

import torch
from torch import Tensor

from stages.teacher.batching import BatchSize, LengthBatcher, PreparedSample, SamplePreparer, prefetch
from stages.teacher.forward import run_teacher
from stages.teacher.in_flight import num_in_flight
from stages.teacher.map_coder import MapCoder
from stages.teacher.num_threads import adopt_num_threads
from stages.teacher.prefix_batching import Batch, PrefixBatch, PrefixBatcher, PrefixGroup
from stages.teacher.prefix_forward import run_continuations, run_prefixes
from stages.teacher.prefix_runs import PrefixRuns
from stages.teacher.runs import Attempt, Passed, run_samples
from stages.teacher.schedule import Schedule
from stages.teacher.teacher import Teacher
from stages.teacher.timings import Timings
from stages.unusable_sample import Reason
from storage.codecs.attention_maps import EncodedMaps
from storage.samples.shard_reader import SampleShard
from storage.targets.commits import SkippedSample
from storage.targets.sample_targets import SampleTargets

PREPARING_THREADS = 4

_FAULTS: dict[Reason, str] = {
    "not_finite": "the teacher's attention or logits hold NaN or infinity",
    "out_of_memory": "the sample alone does not fit into the GPU's memory; lower max_length or take a larger GPU",
}


@dataclass
class ShardObservations:
    """Everything `storage.targets.shard_writer.write_shard` needs of one shard, rows in the order of its tar."""

    samples: list[SampleTargets] = field(default_factory=list)
    maps: list[EncodedMaps] = field(default_factory=list)
    skipped: list[SkippedSample] = field(default_factory=list)


class Observer:
    """A teacher at work; several threads may each give it a shard.

    One shard gives batches to the teacher at a time. The others prepare their first batch meanwhile, and the shard that
    did so before takes and codes its last batches and can be written. Without `overlap` one thing is done after the
    other, in one thread; what comes out is the same.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        overlap: bool = True,
        timings: Timings | None = None,
        batches_in_flight: int | None = None,
    ) -> None:
        """`batches_in_flight` are at most in the teacher at once; None is one, or of several GPUs one more than these.

        It is one without `overlap`, or if the model keeps something of each batch until the next.
        """
        self.teacher = teacher
        self.timings = timings or Timings()
        on_gpu = bool(teacher.gpus)
        self.batch_size = BatchSize(teacher.identity.settings.batch_size, on_gpu=on_gpu)
        self.coder = MapCoder(teacher, self.timings, overlap=overlap)
        at_once = num_in_flight(teacher.identity, len(teacher.gpus), batches_in_flight) if overlap else 1
        self.schedule = Schedule(teacher, self.coder, self.timings, at_once)
        self.preparing = ThreadPoolExecutor(PREPARING_THREADS, "prepare", adopt_num_threads) if overlap else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends its threads."""
        if self.preparing is not None:
            self.preparing.shutdown(cancel_futures=True)
        self.schedule.close()
        self.coder.close()

    def observe(self, shard: SampleShard, progress: Callable[[int], None] | None = None) -> ShardObservations:
        """Runs the teacher over one sample shard.

        A map is computed once for each distinct (image, tokens up to the image's end): under causal attention later
        tokens cannot change it. What cannot be used is in `skipped` with its reason.

        Memory: the coded targets of the shard, a bounded number of batches of prepared samples, and the uncoded maps
        of a few batches (`map_coder.UNCODED_BATCHES` and those in flight).

        `progress` is called with the number of samples finished since the last call.

        Raises:
            UserError: If a batch does not fit into memory and its size was set.
        """
        prepare = SamplePreparer(self.teacher.encoder, shard, self.timings, self.teacher.identity.image_rules)
        work = ShardWork(self, prepare, progress)
        self.schedule.run_shard(work, len(shard))
        return work.finish()

    def shares_prefix(self, sample: PreparedSample) -> bool:
        """Whether the sample's tokens up to its last image are computed apart from those behind them.

        This follows from the sample set alone. So it is the same in every batch and every try, whichever samples
        cannot be used. A sample that is alone with its image would only lose by it.
        """
        return self.teacher.identity.prefix_reuse and sample.may_share_images and sample.map_key is not None

    def try_out(self, sample: PreparedSample) -> None:
        """Runs the teacher on one sample, only to see whether it can."""
        if self.shares_prefix(sample):
            run_continuations(self.teacher, run_prefixes(self.teacher, [sample], ()), [0], [sample])
        else:
            run_teacher(self.teacher, [sample], ())


class ShardWork:
    """The state of one shard on its way through the teacher."""

    def __init__(self, observer: Observer, prepare: SamplePreparer, progress: Callable[[int], None] | None) -> None:
        self._observer, self._prepare = observer, prepare
        self._progress = progress or (lambda _: None)
        self._skipped: list[SkippedSample] = []
        self._owners: dict[str, PreparedSample] = {}
        self._maps: dict[str, Future[EncodedMaps | None]] = {}
        self._seen: dict[int, PreparedSample] = {}

    @property
    def batch_size(self) -> BatchSize:
        """Samples of one forward pass."""
        return self._observer.batch_size

    def batches(self, num_rows: int) -> Generator[Batch, None, None]:
        """The shard's samples in batches; the first in the tar that needs a map becomes its owner."""
        observer, size = self._observer, self._observer.batch_size
        by_length, by_prefix = LengthBatcher(size), PrefixBatcher(size)
        with closing(prefetch(self._prepare, num_rows, observer.preparing, size)) as samples:
            for sample in samples:
                if not self.admit(sample):
                    continue
                batch = by_prefix.add(sample) if observer.shares_prefix(sample) else by_length.add(sample)
                if batch is not None:
                    yield batch
        yield from by_prefix.rest()
        yield from by_length.rest()

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
        self._seen.pop(sample.row, None)
        if sample.map_key is not None and self._owners.get(sample.map_key) is sample:
            del self._owners[sample.map_key]

    def passes(self, batch: Batch, attempt: Attempt) -> Iterator[Passed]:
        """Runs what `batches` gives, in parts if it does not fit into memory together; changes nothing of the shard."""
        teacher, size = self._observer.teacher, self._observer.batch_size
        if isinstance(batch, PrefixBatch):
            return PrefixRuns(teacher, size, attempt, self._wants_map).run(batch.groups)
        return run_samples(teacher, size, attempt, batch, self._is_owner)

    def take(self, batch: Batch, results: Iterable[Passed]) -> None:
        """Takes what forward passes gave of a batch, which is through then."""
        for passed in results:
            self._see(passed)
            self._code(passed.maps)
            self._progress(len(passed.samples))
        for sample in [group.first for group in batch.groups] if isinstance(batch, PrefixBatch) else batch:
            sample.encoded.pixel_inputs.clear()

    def run(self, batch: Batch) -> None:
        """Runs a batch and takes what comes of it."""
        self.take(batch, self.passes(batch, self._observer.schedule.attempt))

    def run_alone(self, sample: PreparedSample) -> None:
        """Runs one sample; what is stored of it is what `run` gives."""
        alone = PrefixBatch([PrefixGroup(sample, [sample])]) if self._observer.shares_prefix(sample) else [sample]
        self.run(alone)

    def run_orphans(self) -> None:
        """Takes the maps whose owner did not fit into memory of the next sample that shares them and does fit."""
        for key, owner in list(self._owners.items()):
            if owner.fault != "out_of_memory":
                continue
            for row, sample in sorted(self._seen.items()):
                if sample.map_key == key and sample.fault is None and key not in self._maps:
                    again = self._prepare(row)
                    assert isinstance(again, PreparedSample)
                    self._owners[key] = again
                    for passed in self.passes([again], self._observer.schedule.attempt):
                        self._code(passed.maps)

    def finish(self) -> ShardObservations:
        """Waits for the coding; rows in tar order, maps numbered by first use."""
        result = ShardObservations(skipped=self._skipped)
        map_rows: dict[str, int] = {}
        for _, sample in sorted(self._seen.items()):
            key, fault = sample.map_key, sample.fault
            coded = self._maps[key].result() if key in self._maps else None
            if key is not None and coded is None and fault is None:
                fault = "not_finite" if key in self._maps else "out_of_memory"
            if fault is not None or sample.logits_RQ is None:
                fault = fault or "not_finite"
                result.skipped.append(SkippedSample(sample.key, sample.id, fault, _FAULTS[fault]))
                continue
            if key is not None and coded is not None and key not in map_rows:
                map_rows[key] = len(result.maps)
                result.maps.append(coded)
            result.samples.append(
                SampleTargets(
                    key=sample.key,
                    token_ids=sample.encoded.token_ids.to(torch.int32),
                    answer_mask=sample.encoded.answer_mask,
                    map_row=None if key is None else map_rows[key],
                    logits_RQ=sample.logits_RQ,
                    num_cut_answer_tokens=sample.encoded.num_cut_answer_tokens,
                    is_turned=sample.is_turned,
                    answer_attention_LaN=sample.answer_attention_LaN,
                )
            )
        result.skipped.sort(key=lambda skipped: skipped.key)
        return result

    def _wants_map(self, group: PrefixGroup) -> bool:
        """Whether the group's map is taken of it: whatever the batches are, it is that of the map's owner."""
        key = group.first.map_key
        return key is not None and key not in self._maps and self._owners[key] in group.samples

    def _is_owner(self, sample: PreparedSample) -> bool:
        return sample.map_key is not None and self._owners[sample.map_key] is sample

    def _see(self, passed: Passed) -> None:
        for sample, logits_RQ, answers_LaN in zip(passed.samples, passed.logits, passed.answers, strict=True):
            sample.logits_RQ, sample.answer_attention_LaN = logits_RQ, answers_LaN
            if answers_LaN is not None and not bool(torch.isfinite(answers_LaN).all()):
                sample.fault = "not_finite"
            self._seen[sample.row] = sample

    def _code(self, maps: dict[str, tuple[Tensor, ...]]) -> None:
        with_cells = [(of_layers, self._owners[key].cells_X) for key, of_layers in maps.items()]
        self._maps.update(zip(maps, self._observer.coder.submit(with_cells), strict=True))
        # The coder lets go of each map when it is coded.
        maps.clear()
