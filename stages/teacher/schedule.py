"""Which batches of shards run beside others in the teacher, and which alone."""

import logging
import threading
from collections.abc import Callable
from contextlib import closing
from itertools import chain, islice
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch

from stages.teacher.device_turns import DeviceTurns
from stages.teacher.in_flight import BatchesInFlight, FailedBeside, Flight, PeakMemory
from stages.teacher.map_coder import MapCoder
from stages.teacher.prefix_batching import Batch, num_samples_of
from stages.teacher.runs import Passed
from stages.teacher.teacher import Teacher
from stages.teacher.timings import Timings

if TYPE_CHECKING:
    from stages.teacher.observe import ShardWork

logger = logging.getLogger(__name__)

T = TypeVar("T")


class _Started(NamedTuple):
    """A batch beside others, and the samples of a forward pass and batches in flight when it started."""

    batch: Batch
    sizes: tuple[int, int]


class Schedule:
    """Runs the batches of shards: side by side where there is room, and one that failed beside others again alone."""

    def __init__(self, teacher: Teacher, coder: MapCoder, timings: Timings, batches_in_flight: int):
        self.in_flight = BatchesInFlight(teacher, batches_in_flight)
        self._gpus, self._coder, self._timings = teacher.gpus, coder, timings
        self._turns = DeviceTurns(teacher, timings)
        self._turn = threading.Lock()
        # On GPUs the first batch of several runs alone, to see what it takes.
        self._has_room = not teacher.gpus
        self._num_misfits = 0

    def close(self) -> None:
        """Ends its threads."""
        self.in_flight.close()
        self._turns.close()

    def run_shard(self, work: "ShardWork", num_rows: int) -> None:
        """Runs all batches of a shard; while its last ones are on their way, another shard may begin with its first.

        Raises:
            UserError: If a batch does not fit into memory and its size was set.
        """

        def run(started: _Started) -> list[Passed]:
            return list(work.passes(started.batch, self._forward_pass))

        def take(started: _Started, results: list[Passed]) -> None:
            work.take(started.batch, results)

        def again(started: _Started, failed: FailedBeside) -> None:
            logger.warning("a batch failed beside others and runs again alone: %s", failed.why)
            # Since it started, a neighbour that failed with it may have made batches smaller or fewer already.
            is_memory = failed.is_memory and self._sizes(work) == started.sizes
            self._run_alone(work, started.batch, did_not_fit_beside=is_memory)

        with closing(work.batches(num_rows)) as batches, closing(Flight(self.in_flight, run, take, again)) as flight:
            first = list(islice(batches, 1))
            with self._turn:
                for batch in chain(first, batches):
                    if self._has_room and self.in_flight.num_batches > 1:
                        flight.start(_Started(batch, self._sizes(work)))
                    else:
                        flight.finish()
                        self._run_alone(work, batch)
            flight.finish()
            with self.in_flight.alone():
                work.run_orphans()

    def _sizes(self, work: "ShardWork") -> tuple[int, int]:
        return work.batch_size.value, self.in_flight.num_batches

    def attempt(self, run: Callable[[], T], num_samples: int) -> T | None:
        """One forward pass with no other beside it; None if its samples do not fit into memory.

        One sample is tried once more when nothing else of ours is in memory.
        """
        for last in (num_samples > 1, True):
            try:
                return self._forward_pass(run, num_samples)
            except torch.OutOfMemoryError:
                pass
            # Here and not in the handler, where the exception still holds the forward pass's tensors.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if last:
                break
            self._coder.wait()
        self._num_misfits += 1
        return None

    def _forward_pass(self, run: Callable[[], T], _: int) -> T:
        """One forward pass, maybe beside others: what it raises need not be its fault."""
        with self._timings.forward(), self._turns.forward_pass():
            return run()

    def _run_alone(self, work: "ShardWork", batch: Batch, *, did_not_fit_beside: bool = False) -> None:
        """Runs a batch with no other in the teacher.

        Where the GPUs have no room for as many such batches as may be in flight, batches are halved or, if their size
        was set, fewer are in flight.
        """
        with self.in_flight.alone():
            num_batches, misfits = self.in_flight.num_batches, self._num_misfits
            memory = PeakMemory(self._gpus if num_batches > 1 else ())
            work.run(batch)
            self._has_room = memory.has_room_for(num_batches)
            if num_batches == 1 or self._num_misfits > misfits or (self._has_room and not did_not_fit_beside):
                return
            size = work.batch_size
            num_samples = min(size.value, num_samples_of(batch))
            if not self._has_room and size.may_shrink and num_samples > 1:
                size.shrink(num_samples)
            else:
                self.in_flight.fewer()
