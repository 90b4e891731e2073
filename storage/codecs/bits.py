"""Integers of a fixed number of bits, one after another in a string of bytes.

Bit n of a string is bit n % 8 (the lowest is 0) of byte n // 8; spare bits of the last byte are 0.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_WIDTH = 25
"""Bits of one integer: with up to 7 bits before it, it lies within 4 bytes."""


def pack_narrow(values: Tensor, width: int) -> Tensor:
    """`[..., ceil(I * width / 8)]` uint8 of `[..., I]` uint8 below 2**width, which is 1, 2, 4 or 8; same device."""
    in_byte = 8 // width
    values = F.pad(values, (0, -values.shape[-1] % in_byte))
    packed = values[..., ::in_byte].clone()
    for position in range(1, in_byte):
        packed |= values[..., position::in_byte] << (width * position)
    return packed


def unpack_narrow(packed: Tensor, count: int, width: int) -> Tensor:
    """`[..., count]` uint8: the inverse of `pack_narrow`."""
    if width == 8:
        return packed
    positions = [(packed >> shift) & (2**width - 1) for shift in range(0, 8, width)]
    return torch.stack(positions, -1).flatten(-2)[..., :count]


def pack_integers(values_RI: Tensor, width: int) -> Tensor:
    """`[R, ceil(I * width / 8)]` uint8: integer k is bits `[k * width, (k + 1) * width)`, its lowest bit first."""
    assert 1 <= width <= MAX_WIDTH
    shifts = torch.arange(width, dtype=torch.int32, device=values_RI.device)
    bits_RJ = ((values_RI.int()[..., None] >> shifts) & 1).flatten(1)
    return pack_narrow(bits_RJ.to(torch.uint8), 1)


def unpack_integers(packed_RQ: Tensor, count: int, width: int) -> Tensor:
    """`[R, count]` int64: the inverse of `pack_integers`."""
    assert 1 <= width <= MAX_WIDTH
    first_I = torch.arange(count, device=packed_RQ.device) * width
    bytes_RQ = F.pad(packed_RQ, (0, 4)).long()
    word_RI = sum(bytes_RQ[:, first_I // 8 + n] << (8 * n) for n in range(4))
    assert isinstance(word_RI, Tensor)
    return (word_RI >> (first_I % 8)) & ((1 << width) - 1)
