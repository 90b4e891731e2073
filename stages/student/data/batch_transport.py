"""A batch as one block of bytes, which a loader process hands over and pinned memory holds in one piece."""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stages.student.data.batch import Batch
from stages.student.data.shared_memory import TO_DO, shared_memory
from storage.errors import UserError, first_line

ALIGNMENT = 64
"""Bytes; every tensor starts at a multiple, as torch's own allocations do."""


@dataclass(frozen=True)
class _ByteRange:
    """Where in the block a tensor lies."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    def view(self, block: Tensor) -> Tensor:
        """The tensor, without a copy."""
        return block[self.start : self.stop].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class FlatBatch:
    """A `Batch` whose tensors share one allocation.

    A tensor that a loader process sends by itself costs an open file and a message in the training process. A batch
    has a dozen tensors for each sample.
    """

    block: Tensor
    """uint8 `[bytes]`."""
    layout: Any
    """The batch with a byte range instead of each tensor."""

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return self.block.numel()

    def share(self) -> None:
        """Moves it to shared memory.

        Raises:
            UserError: If there is not enough of it, or it cannot be written.
        """
        try:
            self.block.share_memory_()  # type: ignore[no-untyped-call]
        except (RuntimeError, OSError) as error:
            found = f"a batch of {self.num_bytes / 2**20:,.1f} MiB cannot be put into shared memory"
            raise UserError(f"{found} ({first_line(error)}); {shared_memory()}; {TO_DO}") from error

    def pin_memory(self) -> "FlatBatch":
        """The same in page-locked memory, from which a GPU copies while it computes; the DataLoader calls this."""
        return replace(self, block=self.block.pin_memory())

    def restore(self) -> Batch:
        """The batch; its tensors are views of the block."""
        batch: Batch = _mapped(self.layout, _ByteRange, lambda span: span.view(self.block))
        return batch


def flatten(batch: Batch) -> FlatBatch:
    """Copies all tensors of a batch, at any depth, into one block."""
    sources: list[tuple[_ByteRange, Tensor]] = []
    end = 0

    def reserve(tensor: Tensor) -> _ByteRange:
        nonlocal end
        start = -(-end // ALIGNMENT) * ALIGNMENT
        end = start + tensor.numel() * tensor.element_size()
        sources.append((_ByteRange(tensor.dtype, tuple(tensor.shape), start, end), tensor))
        return sources[-1][0]

    layout = _mapped(batch, Tensor, reserve)
    block = torch.empty(end, dtype=torch.uint8)
    for span, tensor in sources:
        span.view(block).copy_(tensor)
    return FlatBatch(block, layout)


def _mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """`value` with each part of this kind changed, at any depth of dataclasses, dicts and tuples."""
    if isinstance(value, kind):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _mapped(getattr(value, f.name), kind, change) for f in fields(value)})
    if isinstance(value, dict):
        return {name: _mapped(part, kind, change) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_mapped(part, kind, change) for part in value)
    return value
