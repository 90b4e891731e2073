"""The batches of each optimizer step, made by loader processes ahead of the training process."""

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from stages.student.data.batch import Batch
from stages.student.data.batch_transport import FlatBatch, flatten
from stages.student.data.collator import Collator
from stages.student.data.config import LoaderConfig
from stages.student.data.shared_memory import TO_DO, check_room, shared_memory
from storage.errors import PassingFailure, UserError
from storage.safe_path import check_safe_path, keep_children_safe
from storage.streaming.order import num_microbatches
from storage.streaming.stream import Mixture, mixture_stream

MOST_WORKERS = 4
"""Loader processes of one training process, unless the user says so."""
LEAST_AHEAD = 2
"""Microbatches that each of them makes ahead, unless the user says so."""
POLL_S = 1.0
"""How often the training process looks up while it waits for a batch."""


class LoaderDied(PassingFailure):
    """A loader process was killed, by a lack of memory or by a signal, or makes no batches any more."""


class StoppedWaiting(Exception):
    """The run was asked to stop while it waited for a batch."""


class StepLoader:
    """This rank's part of every optimizer step, in pinned memory if the device is a GPU.

    Make it early: the server that loader processes are copied from starts at once, and imports for seconds meanwhile.
    The mixture has the sizes of steps and microbatches. Attention maps are read only
    `with_maps`, answer attention only `with_answers`.
    """

    def __init__(
        self,
        mixture: Mixture,
        collator: Collator,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        config: LoaderConfig,
        with_maps: bool,
        with_answers: bool = False,
    ) -> None:
        self.mixture, self.collator, self.device, self.world_size = mixture, collator, device, world_size
        self._stream = partial(
            mixture_stream, mixture, rank=rank, world_size=world_size, with_maps=with_maps, with_answers=with_answers
        )
        self.num_workers = spare_workers(device) if config.num_workers is None else config.num_workers
        self.prefetch, self.stall_s = self._prefetch(config.prefetch), config.stall_s
        self._context = _context(remote=mixture.is_remote) if self.num_workers else None
        self._room_checked = False

    def steps(
        self, epochs: range, start_step: int, should_stop: Callable[[], bool] = lambda: False
    ) -> Generator[list[Batch]]:
        """The microbatches of each step of these epochs, from `start_step` of the first one.

        Close it if you stop before its end: that ends the loader processes. `should_stop` is asked while it waits.

        Raises:
            UserError: If reading or collating raised it, in whichever process; if shared memory cannot be used, or is
                too small for the batches that loader processes have ready.
            LoaderDied: If a loader process was killed, or no batch came for `LoaderConfig.stall_s`.
            StoppedWaiting: If `should_stop` said yes.
        """
        mixture, config = self.mixture, self.mixture.config
        batches: Any = self._begun(epochs, start_step)
        try:
            for epoch in epochs:
                for step in range(start_step if epoch == epochs[0] else 0, mixture.num_steps):
                    size = min(config.batch_size, mixture.num_samples - step * config.batch_size)
                    count = num_microbatches(size, config.microbatch_size, self.world_size)
                    yield [self._received(batches, should_stop).restore() for _ in range(count)]
        except (StoppedWaiting, LoaderDied):
            # They may hang, and ignore the signal by which the DataLoader ends them.
            for process in batches._workers:
                process.kill()
            raise
        finally:
            # An error keeps this iterator alive. The garbage collector would end the threads of its queues first; its
            # processes would then never read that they may end.
            if self.num_workers:
                batches._shutdown_workers()

    def _prefetch(self, wanted: int | None) -> int | None:
        if wanted is not None or not self.num_workers:
            return wanted
        # Together a whole step, or the training process waits for the rest.
        config = self.mixture.config
        count = num_microbatches(config.batch_size, config.microbatch_size, self.world_size)
        return max(LEAST_AHEAD, math.ceil(count / self.num_workers))

    def _begun(self, epochs: range, start_step: int) -> Any:
        """The batches of a DataLoader whose processes have started."""
        # Not prepared by accelerate, which would split the stream over the ranks a second time.
        loader: DataLoader[Any] = DataLoader(
            _FlatBatches(self._stream(epochs=epochs, start_step=start_step), self.collator),
            batch_size=None,
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch if self.num_workers else None,
            # Not an error yet: `_received` asks then whether to wait on.
            timeout=POLL_S if self.num_workers else 0,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_begin_worker,
            multiprocessing_context=self._context,
            # Otherwise the loader draws from the generator of dropout, once more after each resume.
            generator=torch.Generator().manual_seed(self.mixture.config.seed),
        )
        try:
            # Needs shared memory too; a half-made iterator would print a traceback when it is deleted.
            if self._context is not None:
                self._context.Lock()
            return iter(loader)
        except OSError as error:
            raise UserError(f"loader processes cannot be started: {error}; {shared_memory()}; {TO_DO}") from error

    def _received(self, batches: "Iterator[FlatBatch | UserError]", should_stop: Callable[[], bool]) -> FlatBatch:
        """The next batch, once it is there."""
        give_up = time.monotonic() + self.stall_s
        while True:
            try:
                batch = next(batches)
            except RuntimeError as error:
                if "DataLoader timed out" in str(error):
                    if should_stop():
                        raise StoppedWaiting from None
                    if time.monotonic() < give_up:
                        continue
                    found = f"no batch came from the loader processes for {self.stall_s:g} s"
                elif "DataLoader worker" in str(error):
                    found = f"a loader process died ({error})"
                else:
                    raise
                raise LoaderDied(f"{found}; {shared_memory()}; {TO_DO}, then run the same command again") from error
            if isinstance(batch, UserError):
                raise batch
            if self.num_workers and not self._room_checked:
                check_room(batch.num_bytes, self.num_workers * (self.prefetch or 1) + 1)
                self._room_checked = True
            return batch


def next_group(groups: Iterator[list[Batch]], should_stop: Callable[[], bool]) -> list[Batch]:
    """The microbatches of the next step; none if the run was asked to stop.

    Raises:
        LoaderDied: As `StepLoader.steps`, unless the run was asked to stop.
    """
    try:
        return next(groups)
    except StoppedWaiting:
        return []
    except LoaderDied:
        if not should_stop():
            raise
        # A launcher that stops the job may stop its loader processes first.
        return []


def spare_workers(device: torch.device) -> int:
    """Loader processes for the machine's spare cores, for each training process, at most `MOST_WORKERS`.

    A training process on a GPU keeps one core busy; one on the CPU keeps as many as torch has threads.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    computing = torch.get_num_threads() if device.type == "cpu" else 1
    return max(0, min(MOST_WORKERS, cores // processes - computing))


def _context(*, remote: bool) -> BaseContext:
    """How loader processes start: never as a copy of this process, whose threads may hold a lock.

    They are copies of a server that has only imported this module; it starts here. For object stores each is a new
    process, because the server keeps the environment of its first use, and credentials may be newer.
    """
    keep_children_safe()
    if remote:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    forkserver.ensure_running()
    return context


class _FlatBatches(IterableDataset[Any]):
    """The stream's samples as flat batches, collated in the loader process.

    A `UserError` becomes the last item, because the DataLoader would add a traceback to its message.
    """

    def __init__(self, stream: IterableDataset[Any], collator: Collator) -> None:
        self._stream, self._collator = stream, collator

    def __iter__(self) -> Iterator[FlatBatch | UserError]:
        try:
            if get_worker_info() is not None:
                check_safe_path()
            for samples in self._stream:
                batch = flatten(self._collator(samples))
                if get_worker_info() is not None:
                    # Here, where an error is seen: the DataLoader's own thread would drop the batch.
                    batch.share()
                yield batch
        except UserError as error:
            yield error


def _begin_worker(_number: int) -> None:
    """Ignores signals to the process group: the training process saves its state and then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    threading.Thread(target=_end_with, args=[trainer], daemon=True).start()


def _end_with(trainer: BaseProcess) -> None:
    """Ends this process when the training process has ended in any way.

    The DataLoader itself watches the direct parent only: the server, which lives as long as this process.
    """
    trainer.join()
    os._exit(1)
