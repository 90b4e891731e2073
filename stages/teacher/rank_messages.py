"""What rank 0 sends the other ranks of a teacher through their pipes: a forward pass, as JSON and plain numbers.

A message is 8 bytes with the length of its JSON, the JSON, and the bytes of its tensors one after the other.
"""

import json
import struct
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, Final

import torch
from torch import Tensor

from stages.conversations.encoder import EncodedConversation
from stages.teacher.batching import PreparedSample
from storage.digests import parse_object

_LENGTH: Final = struct.Struct("<Q")
_DTYPES: Final = {
    str(dtype): dtype
    for dtype in (
        torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Pass:
    """A forward pass of all ranks."""

    name: str
    """Of the function that each calls."""
    batch: Sequence[PreparedSample]
    """Of what a sample is, ranks get what the pass depends on."""
    wanted: Collection[PreparedSample] = ()
    """Those of the batch whose maps are wanted."""
    rows: Sequence[int] = ()
    """Of each sample, the row of its prefix among those of the last pass over prefixes."""


def write_pass(pipe: IO[bytes], asked: Pass) -> None:
    """Sends a pass; not atomic."""
    tensors: list[Tensor] = []
    samples = [_sample_fields(sample, tensors) for sample in asked.batch]
    wanted = [number for number, sample in enumerate(asked.batch) if sample in asked.wanted]
    fields = {"name": asked.name, "samples": samples, "wanted": wanted, "rows": list(asked.rows)}
    fields["tensors"] = [[str(tensor.dtype), list(tensor.shape)] for tensor in tensors]
    write_fields(pipe, fields)
    for tensor in tensors:
        pipe.write(_bytes_of(tensor.detach().cpu().contiguous()))
    pipe.flush()


def read_pass(pipe: IO[bytes]) -> Pass | None:
    """The next pass; None when there is none any more."""
    if (fields := read_fields(pipe)) is None:
        return None
    tensors = iter([_read_tensor(pipe, _DTYPES[name], shape) for name, shape in fields["tensors"]])
    batch = [_sample(row, sample, tensors) for row, sample in enumerate(fields["samples"])]
    return Pass(fields["name"], batch, [batch[number] for number in fields["wanted"]], fields["rows"])


def write_fields(pipe: IO[bytes], fields: dict[str, Any]) -> None:
    """Sends a JSON object alone."""
    data = json.dumps(fields).encode()
    pipe.write(_LENGTH.pack(len(data)) + data)
    pipe.flush()


def read_fields(pipe: IO[bytes]) -> dict[str, Any] | None:
    """The next JSON object; None when the other side has closed the pipe, in the middle of one too."""
    size, data = bytearray(_LENGTH.size), bytearray()
    if _fill(pipe, memoryview(size)):
        data = bytearray(_LENGTH.unpack(size)[0])
    if not data or not _fill(pipe, memoryview(data)):
        return None
    return parse_object(bytes(data), "a message between ranks of a teacher", "start again")


def _sample_fields(sample: PreparedSample, tensors: list[Tensor]) -> dict[str, Any]:
    """Of a sample what is no tensor; its tensors are appended in the order in which `_sample` takes them."""
    encoded = sample.encoded
    tensors += [encoded.token_ids, encoded.answer_mask, encoded.image_positions]
    tensors += [] if sample.cells_X is None else [sample.cells_X]
    tensors += encoded.pixel_inputs.values()
    return {
        "key": sample.key,
        "map_key": sample.map_key,
        "num_images": encoded.num_images,
        "has_cells": sample.cells_X is not None,
        "pixels": list(encoded.pixel_inputs),
    }


def _sample(row: int, fields: dict[str, Any], tensors: Iterator[Tensor]) -> PreparedSample:
    token_ids, answer_mask, image_positions = next(tensors), next(tensors), next(tensors)
    cells_X = next(tensors) if fields["has_cells"] else None
    pixels = {name: next(tensors) for name in fields["pixels"]}
    encoded = EncodedConversation(token_ids, answer_mask, pixels, image_positions, fields["num_images"])
    return PreparedSample(row, fields["key"], "", encoded, fields["map_key"], cells_X=cells_X)


def _read_tensor(pipe: IO[bytes], dtype: torch.dtype, shape: list[int]) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.numel() and not _fill(pipe, _bytes_of(tensor)):
        raise EOFError("the pipe was closed in the middle of a pass")
    return tensor


def _bytes_of(tensor: Tensor) -> memoryview:
    """Of a contiguous tensor; no copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _fill(pipe: IO[bytes], into: memoryview) -> bool:
    """Reads so many bytes; False if the pipe is closed before."""
    while len(into):
        # A pipe gives what is there.
        if not (num_bytes := pipe.readinto(into)):  # type: ignore[attr-defined]
            return False
        into = into[num_bytes:]
    return True
