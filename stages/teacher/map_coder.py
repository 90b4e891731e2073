"""Codes attention maps on the teacher's devices, beside its next forward pass."""

import threading
from collections import deque
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor

from stages.teacher.num_threads import adopt_num_threads
from stages.teacher.placement import on_streams, stacked
from stages.teacher.teacher import Teacher
from stages.teacher.timings import Timings
from storage.codecs.attention_maps import EncodedMaps

UNCODED_BATCHES = 2  # batches whose uncoded maps may wait, `[L, N, N]` float32 a map, on the teacher's devices


class MapCoder:
    """Codes the maps of one batch after the other, in a thread of its own or, without `overlap`, in the caller's.

    Two shards may each give it batches.
    """

    def __init__(self, teacher: Teacher, timings: Timings, *, overlap: bool) -> None:
        self._teacher, self._timings = teacher, timings
        self._thread = ThreadPoolExecutor(1, "code", adopt_num_threads) if overlap else None
        self._streams = [torch.cuda.Stream(gpu) for gpu in teacher.gpus]  # type: ignore[no-untyped-call]
        self._uncoded: deque[list[Future[EncodedMaps | None]]] = deque()
        self._lock = threading.Lock()

    def submit(self, batch: Collection[tuple[tuple[Tensor, ...], Tensor | None]]) -> list[Future[EncodedMaps | None]]:
        """Codes of each image's maps, which may be of cells of its tokens; None for maps that are not finite."""
        with self._lock:
            self._wait(UNCODED_BATCHES - 1)
            coding = [self._start(*maps) for maps in batch]
            self._uncoded.append(coding)
        return coding

    def wait(self) -> None:
        """Until no batch holds memory of the teacher's devices."""
        with self._lock:
            self._wait(0)

    def _wait(self, num_batches: int) -> None:
        while len(self._uncoded) > num_batches:
            wait(self._uncoded.popleft())

    def close(self) -> None:
        """Ends the thread."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _start(self, maps: tuple[Tensor, ...], cells_X: Tensor | None) -> Future[EncodedMaps | None]:
        if self._thread is not None:
            return self._thread.submit(self._code, maps, cells_X)
        done: Future[EncodedMaps | None] = Future()
        done.set_result(self._code(maps, cells_X))
        return done

    def _code(self, maps: tuple[Tensor, ...], cells_X: Tensor | None) -> EncodedMaps | None:
        with torch.inference_mode(), on_streams(self._streams), self._timings.measured("coding"):
            if not all(bool(torch.isfinite(map_NN).all()) for map_NN in maps):
                return None
            codec, cpu = self._teacher.identity.map_codec, torch.device("cpu")
            try:
                together = stacked(maps)
                on_device_X = None if cells_X is None else cells_X.to(together.device)
                return codec.encode(together, on_device_X).to(cpu)
            except torch.OutOfMemoryError:
                # The next batch has the GPU's memory; the CPU is slower, and nobody waits.
                return codec.encode(torch.stack([map_NN.cpu() for map_NN in maps]), cells_X)
