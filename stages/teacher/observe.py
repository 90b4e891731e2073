"""What the teacher says of the samples of one shard: tokens, attention maps, answer logits.

Three things go on at once: threads prepare samples (`batching.py`), one batch is in the teacher (`forward.py`), and
a thread codes the maps of the batch before (`map_coder.py`).
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import Self, TypeGuard, TypeVar

import torch
from torch import Tensor

from stages.teacher.batching import BatchSize, LengthBatcher, PreparedSample, SamplePreparer, prefetch
from stages.teacher.forward import run_teacher
from stages.teacher.map_coder import MapCoder
from stages.teacher.num_threads import adopt_num_threads
from stages.teacher.prefix_batching import PrefixBatch, PrefixBatcher, PrefixGroup
from stages.teacher.prefix_forward import run_continuations, run_prefixes
from stages.teacher.prefix_runs import PrefixRuns
from stages.teacher.teacher import Teacher
from stages.teacher.timings import Timings
from stages.unusable_sample import Reason
from storage.codecs.attention_maps import EncodedMaps
from storage.samples.shard_reader import SampleShard
from storage.targets.commits import SkippedSample
from storage.targets.sample_targets import SampleTargets

PREPARING_THREADS = 4

_T = TypeVar("_T")

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

    One shard has the teacher at a time. The others prepare their first batch meanwhile, and the shard that had it
    before codes its last batches and can be written. Without `overlap` one thing is done after the other, in one
    thread; what comes out is the same.
    """

    def __init__(self, teacher: Teacher, *, overlap: bool = True, timings: Timings | None = None) -> None:
        self.teacher = teacher
        self.timings = timings or Timings()
        on_gpu = bool(teacher.gpus)
        self.batch_size = BatchSize(teacher.identity.settings.batch_size, on_gpu=on_gpu)
        self.coder = MapCoder(teacher, self.timings, overlap=overlap)
        self._turn = threading.Lock()
        self.preparing = ThreadPoolExecutor(PREPARING_THREADS, "prepare", adopt_num_threads) if overlap else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends its threads."""
        if self.preparing is not None:
            self.preparing.shutdown(cancel_futures=True)
        self.coder.close()

    def observe(self, shard: SampleShard, progress: Callable[[int], None] | None = None) -> ShardObservations:
        """Runs the teacher over one sample shard.

        A map is computed once for each distinct (image, tokens up to the image's end): under causal attention later
        tokens cannot change it. What cannot be used is in `skipped` with its reason.

        Memory: the coded targets of the shard, a bounded number of batches of prepared samples, and the uncoded maps
        of a few batches (`map_coder.UNCODED_BATCHES` + 1).

        `progress` is called with the number of samples finished since the last call.

        Raises:
            UserError: If a batch does not fit into memory and its size was set.
        """
        prepare = SamplePreparer(self.teacher.encoder, shard, self.timings, self.teacher.identity.image_rules)
        work = ShardWork(self, prepare, progress)
        with closing(work.batches(len(shard))) as batches:
            first = list(itertools.islice(batches, 1))
            with self._turn:
                for batch in itertools.chain(first, batches):
                    work.run(batch)
                work.run_orphans()
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

    def attempt(self, run: Callable[[], _T], num_samples: int) -> _T | None:
        """One forward pass; None if its samples do not fit into memory.

        One that is alone is tried once more when nothing else of ours is in memory.
        """
        for last in (num_samples > 1, True):
            try:
                with self.timings.forward():
                    return run()
            except torch.OutOfMemoryError:
                pass
            # Here and not in the handler, where the exception still holds the forward pass's tensors.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if last:
                break
            self.coder.wait()
        return None


class ShardWork:
    """The state of one shard on its way through the teacher."""

    def __init__(self, observer: Observer, prepare: SamplePreparer, progress: Callable[[int], None] | None) -> None:
        self._observer, self._prepare = observer, prepare
        self._progress = progress or (lambda _: None)
        self._skipped: list[SkippedSample] = []
        self._owners: dict[str, PreparedSample] = {}
        self._maps: dict[str, Future[EncodedMaps | None]] = {}
        self._seen: dict[int, PreparedSample] = {}

    def batches(self, num_rows: int) -> Generator[list[PreparedSample] | PrefixBatch, None, None]:
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

    def run(self, batch: Sequence[PreparedSample] | PrefixBatch) -> None:
        """Runs what `batches` gives, in parts if it does not fit into memory together."""
        if isinstance(batch, PrefixBatch):
            PrefixRuns(self._observer, self._wants_map, self._code, self._done).run(batch.groups)
            return
        waiting = deque(batch)
        while waiting:
            part = [waiting.popleft() for _ in range(min(self._observer.batch_size.value, len(waiting)))]
            if self._run_part(part):
                self._progress(len(part))
            else:
                waiting.extendleft(reversed(part))

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
                    self._run_part([again])
                    self._seen[row] = sample

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

    def _run_part(self, part: Sequence[PreparedSample]) -> bool:
        """One forward pass; False if it must be tried again with fewer samples."""
        observer = self._observer
        owners = {sample for sample in part if sample.map_key and self._owners[sample.map_key] is sample}
        output = observer.attempt(lambda: run_teacher(observer.teacher, part, owners), len(part))
        if output is None and len(part) > 1:
            observer.batch_size.shrink(len(part))
            return False
        if output is None:
            part[0].fault = "out_of_memory"
            self._see(part, [None], [None])
        else:
            observer.batch_size.fitted(len(part))
            self._see(part, output.logits, output.answers)
            self._code(output.maps)
        for sample in part:
            sample.encoded.pixel_inputs.clear()
        return True

    def _wants_map(self, group: PrefixGroup) -> bool:
        """Whether the group's map is taken of it: whatever the batches are, it is that of the map's owner."""
        key = group.first.map_key
        return key is not None and key not in self._maps and self._owners[key] in group.samples

    def _done(
        self, samples: Sequence[PreparedSample], logits: Sequence[Tensor | None], answers: Sequence[Tensor | None]
    ) -> None:
        self._see(samples, logits, answers)
        self._progress(len(samples))

    def _see(
        self, samples: Sequence[PreparedSample], logits: Sequence[Tensor | None], answers: Sequence[Tensor | None]
    ) -> None:
        for sample, logits_RQ, answers_LaN in zip(samples, logits, answers, strict=True):
            sample.logits_RQ, sample.answer_attention_LaN = logits_RQ, answers_LaN
            if answers_LaN is not None and not bool(torch.isfinite(answers_LaN).all()):
                sample.fault = "not_finite"
            self._seen[sample.row] = sample

    def _code(self, maps: dict[str, tuple[Tensor, ...]]) -> None:
        with_cells = [(of_layers, self._owners[key].cells_X) for key, of_layers in maps.items()]
        self._maps.update(zip(maps, self._observer.coder.submit(with_cells), strict=True))
