"""The kept log-probabilities of an answer row: float16 values, and levels of about 4 bits between them."""

import torch
from torch import Tensor

from storage.codecs.bits import pack_narrow, unpack_narrow
from storage.codecs.codec_settings import LogitCodecConfig

LOWEST_LOGPROB = -50.0
"""The `levels` codec stores rarer tokens as this rare: 2e-22 each, 4e-6 at temperature 4."""


def encode_kept(config: LogitCodecConfig, kept_RK: Tensor) -> list[Tensor]:
    """Float16 values and packed levels of `[R, K]` float64 log-probabilities, which fall along each row.

    Of the levels, from level 0 up, a 1 stands for each value on a level and a 0 for each step to the next level.
    """
    if config.name == "levels":
        kept_RK = kept_RK.clamp(min=LOWEST_LOGPROB)
    values_RF = torch.cat([kept_RK[:, : config.num_values - 1], kept_RK[:, -1:]], dim=1).half()
    if not config.num_coded:
        return [values_RF.view(torch.uint8)]
    top_R1, lowest_R1 = values_RF[:, -2:-1].double(), values_RF[:, -1:].double()
    range_R1 = (top_R1 - lowest_R1).clamp(min=torch.finfo(torch.float16).tiny)
    depth_RI = ((top_R1 - kept_RK[:, config.num_values - 1 : -1]) / range_R1).clamp(0, 1)
    levels_RI = (depth_RI.sqrt() * (config.num_levels - 1)).round().long()
    positions_RI = levels_RI + torch.arange(config.num_coded, device=kept_RK.device)
    bits_RJ = torch.zeros((len(kept_RK), config.num_level_bits), dtype=torch.uint8, device=kept_RK.device)
    return [values_RF.view(torch.uint8), pack_narrow(bits_RJ.scatter_(1, positions_RI, 1), 1)]


def decode_kept(config: LogitCodecConfig, values_RQ: Tensor, levels_RQ: Tensor) -> Tensor:
    """`[R, K]` float32: the inverse of `encode_kept`, given both parts as bytes."""
    values_RF = floats_from_bytes(values_RQ, torch.float16)
    if not config.num_coded:
        return values_RF
    top_R, lowest_R = values_RF[:, -2], values_RF[:, -1]
    bits_RJ = unpack_narrow(levels_RQ, config.num_level_bits, 1)
    # Positions of the ones: a stable sort puts them first, in order, and needs no copy to the host.
    positions_RI = bits_RJ.sort(dim=1, descending=True, stable=True).indices[:, : config.num_coded]
    levels_RI = positions_RI - torch.arange(config.num_coded, device=levels_RQ.device)
    coded_RI = top_R[:, None] - (top_R - lowest_R)[:, None] * (levels_RI.float() / (config.num_levels - 1)).square()
    return torch.cat([values_RF[:, :-1], coded_RI, values_RF[:, -1:]], dim=1)


def floats_from_bytes(bytes_RQ: Tensor, dtype: torch.dtype) -> Tensor:
    """`[R, n]` float32 of little-endian numbers."""
    # A copy: a part of a record may begin at an odd byte.
    flat = bytes_RQ.clone(memory_format=torch.contiguous_format).flatten().view(dtype)
    return flat.view(len(bytes_RQ), bytes_RQ.shape[1] // dtype.itemsize).float()
