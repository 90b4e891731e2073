"""Which batch computes on which of a teacher's devices: one at a time on each, in the order in which they come to it.

Batches that shared a device would leave it together, and those behind it would have nothing to do until then. A batch
gives its turn back when its work is handed to the device, before that is done. So the next is handed over meanwhile.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from stages.teacher.placement import execution_device
from stages.teacher.teacher import Teacher
from stages.teacher.timings import Timings


class _Turn:
    """Of one device: who holds the lock gives it work."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.left: torch.cuda.Event | None = None
        """When the batch before is through; on a GPU alone."""


class _Batch(threading.local):
    """Where the batch of a thread is."""

    is_running = False
    device: torch.device | None = None
    came: torch.cuda.Event | None = None

    def __init__(self) -> None:
        self.visits: list[tuple[torch.device, torch.cuda.Event, torch.cuda.Event]] = []


class DeviceTurns:
    """Turns of batches on the devices of a teacher's decoder, and how long each GPU was busy.

    A GPU counts as busy from a batch's first kernel on it to its last; pauses between them count, too. What runs
    outside the decoder's layers on another GPU than the layers around it (angles of positions, a head that is the
    embedding) waits for no turn and is not counted.
    """

    def __init__(self, teacher: Teacher, timings: Timings) -> None:
        self._timings, self._batch = timings, _Batch()
        layers = list(teacher.model.get_decoder().layers)
        places = [execution_device(layer) for layer in layers]
        self._turns = {device: _Turn() for device in (teacher.device, *places)}
        steps = zip(layers, places, [teacher.device, *places], strict=False)
        entered = [(layer, here) for layer, here, before in steps if here != before]
        self._hooks = [
            part.register_forward_pre_hook(partial(self._come_to, device))
            for part, device in [(teacher.model.model, teacher.device), *entered]
        ]

    def close(self) -> None:
        """Takes its hooks from the model."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """A forward pass of the calling thread, which is done when the block ends."""
        batch = self._batch
        batch.is_running = True
        batch.visits.clear()
        try:
            yield
            self._leave()
            for device, came, left in batch.visits:
                left.synchronize()
                self._timings.add_busy(device, came.elapsed_time(left) / 1000)
        finally:
            batch.is_running = False
            self._leave()

    def _come_to(self, device: torch.device, *_: Any) -> None:
        batch = self._batch
        if not batch.is_running or batch.device == device:
            return
        before, turn = self._leave(), self._turns[device]
        turn.lock.acquire()
        batch.device = device
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            for event in (before, turn.left):
                if event is not None:
                    stream.wait_event(event)
            batch.came = _now(stream)

    def _leave(self) -> "torch.cuda.Event | None":
        """Gives the turn back; when the batch is through on its GPU, if it was on one."""
        batch = self._batch
        if (device := batch.device) is None:
            return None
        batch.device, turn = None, self._turns[device]
        try:
            if device.type != "cuda" or batch.came is None:
                return None
            turn.left = _now(torch.cuda.current_stream(device))
            batch.visits.append((device, batch.came, turn.left))
            return turn.left
        finally:
            batch.came = None
            turn.lock.release()


def _now(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event
