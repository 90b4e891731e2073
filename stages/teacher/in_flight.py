"""Several batches in a teacher at once, each in a thread of its own, so that each of its GPUs has one to compute.

A batch that fails beside others is not judged by that: it runs again alone, as if there were no others, and what it
does then counts. Results are the same however many are in flight, and in whatever order they end.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from transformers import PretrainedConfig

from stages.teacher.identity import TeacherIdentity
from stages.teacher.num_threads import adopt_num_threads
from stages.teacher.placement import on_streams
from stages.teacher.teacher import Teacher

logger = logging.getLogger(__name__)

T = TypeVar("T")
B = TypeVar("B")


def num_in_flight(teacher: TeacherIdentity, num_gpus: int, asked: int | None = None) -> int:
    """Batches that are in a model at once: `asked`, or one on each of several GPUs and one that waits for the first.

    It is one where `why_one` has a reason.
    """
    if why_one(teacher) is not None:
        return 1
    return asked or (num_gpus + 1 if num_gpus > 1 else 1)


def why_one(teacher: TeacherIdentity) -> str | None:
    """Why no second batch can be in a teacher; None if one can."""
    if teacher.settings.parallel == "tensor":
        return "the processes that share its layers (teacher.parallel) take part in one forward pass after the other"
    return kept_between_batches(teacher.config)


def kept_between_batches(config: PretrainedConfig) -> str | None:
    """What a model of this config keeps of one batch until the next, which then cannot be in it too; None if nothing.

    `tests/stages/teacher/test_in_flight.py` holds all families to it.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = {str(one.get("rope_type")) for one in (rope, *rope.values()) if isinstance(one, Mapping)}
    if changing := {kind for kind in kinds if "dynamic" in kind or kind == "longrope"}:
        return f"its positions ({min(changing)}) are scaled by the length of the last batch"
    parts = (config, text, getattr(config, "vision_config", None))
    if any(getattr(part, "is_causal", None) is not None for part in parts):
        return "the library changes its config (is_causal) during a batch"
    return None


@dataclass(frozen=True)
class FailedBeside:
    """Why a batch failed that was not alone."""

    is_memory: bool
    why: str


class BatchesInFlight:
    """The threads of batches in flight, of all shards together, and who may be in the teacher alone.

    A batch has a slot until its results are taken. So what lies in memory of batches is bounded, not only what runs.
    """

    def __init__(self, teacher: Teacher, num_batches: int) -> None:
        self.num_batches = num_batches
        self._gpus = teacher.gpus
        self._slots, self._gate = threading.Semaphore(num_batches), threading.Lock()
        self._own = threading.local()
        teacher.synchronize()
        self._threads = ThreadPoolExecutor(num_batches, "batch", self._begin) if num_batches > 1 else None

    def close(self) -> None:
        """Ends its threads, when the batches that are in the teacher are through."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def start(self, run: Callable[[], T], *, patiently: bool) -> "Future[T | FailedBeside] | None":
        """Starts a batch beside the others; None if there is no slot for it now, and it is not to wait for one."""
        assert self._threads is not None
        # Whoever wants to be alone holds the gate: nobody gets a slot meanwhile.
        if not self._gate.acquire(blocking=patiently):
            return None
        try:
            if not self._slots.acquire(blocking=patiently):
                return None
        finally:
            self._gate.release()
        return self._threads.submit(self._run, run)

    def taken(self) -> None:
        """The results of a batch that was started are taken."""
        self._slots.release()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside the block no batch is in the teacher that was started. The calling thread has none itself."""
        with self._gate:
            for _ in range(self.num_batches):
                self._slots.acquire()
            try:
                yield
            finally:
                self._slots.release(self.num_batches)

    def fewer(self) -> None:
        """From now on one less, of several, as they do not fit into memory together; inside `alone`."""
        self.num_batches -= 1
        logger.warning("from now on %d batches at once are in the teacher: more do not fit", self.num_batches)

    def _begin(self) -> None:
        adopt_num_threads()
        self._own.streams = [torch.cuda.Stream(gpu) for gpu in self._gpus]  # type: ignore[no-untyped-call]

    def _run(self, run: Callable[[], T]) -> T | FailedBeside:
        try:
            with on_streams(self._own.streams):
                return run()
        except torch.OutOfMemoryError as error:
            return FailedBeside(True, str(error))
        except Exception as error:
            return FailedBeside(False, f"{type(error).__name__}: {error}")


class Flight(Generic[B, T]):
    """The batches of one shard in flight, the oldest first."""

    def __init__(
        self,
        slots: BatchesInFlight,
        run: Callable[[B], T],
        take: Callable[[B, T], None],
        again: Callable[[B, FailedBeside], None],
    ) -> None:
        """`run` is called in other threads; `take` with what it gave, or `again` if it failed, in the caller's."""
        self._slots, self._run, self._take, self._again = slots, run, take, again
        self._started: deque[tuple[B, Future[T | FailedBeside]]] = deque()

    def start(self, batch: B) -> None:
        """Starts a batch as soon as there is a slot for it; takes the results of older ones until there is."""
        # Whoever waits holds no slot: or two shards could wait for each other.
        while (future := self._slots.start(lambda: self._run(batch), patiently=not self._started)) is None:
            self._finish_oldest()
        self._started.append((batch, future))

    def finish(self) -> None:
        """Takes the results of all that are in flight."""
        while self._started:
            self._finish_oldest()

    def close(self) -> None:
        """Waits for what is in the teacher after an error, and takes no results."""
        for _, future in self._started:
            future.cancel()
        wait([future for _, future in self._started])
        while self._started:
            self._started.popleft()
            self._slots.taken()

    def _finish_oldest(self) -> None:
        batch, future = self._started[0]
        found = future.result()
        try:
            if not isinstance(found, FailedBeside):
                self._take(batch, found)
        finally:
            self._started.popleft()
            self._slots.taken()
        if isinstance(found, FailedBeside):
            self.finish()
            self._again(batch, found)


class PeakMemory:
    """What a batch takes of the GPUs' memory, from its making on."""

    def __init__(self, gpus: tuple[torch.device, ...]) -> None:
        self._before = {gpu: torch.cuda.memory_allocated(gpu) for gpu in gpus}
        for gpu in gpus:
            torch.cuda.reset_peak_memory_stats(gpu)

    def has_room_for(self, num_batches: int) -> bool:
        """Whether so many of the batch that ran since then fit together."""
        return all(self._fits(gpu, num_batches, before) for gpu, before in self._before.items())

    def _fits(self, gpu: torch.device, num_batches: int, before: int) -> bool:
        taken = torch.cuda.max_memory_allocated(gpu) - before
        free, _ = torch.cuda.mem_get_info(gpu)
        return num_batches * taken <= free + torch.cuda.memory_reserved(gpu) - before
