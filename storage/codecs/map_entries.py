"""Codes of a map's entries: 16-bit floats, or 8, 4 or 2 bits spaced by square roots up to a cap.

The cosine loss averages hundreds of entries of each key, so coarse values do no harm as long as they do not err to one
side. That error, and which entries count as sinks, is corrected for each window (`windows.py`). Values above the cap
are sinks in almost any window.
"""

import torch
from torch import Tensor

from storage.codecs.bits import pack_narrow, unpack_narrow
from storage.codecs.codec_settings import MapCodecConfig, num_entries
from storage.codecs.sinks import map_mean_std
from storage.codecs.triangle import pack_entries

CAP_GRID = 2.0**24
"""Caps are whole multiples of 2^-24, so that sums of codes times caps are exact in float64 on any machine."""


def code_dtype(config: MapCodecConfig) -> torch.dtype:
    """Element type of the stored codes."""
    return torch.float16 if config.name == "float16" else torch.uint8


def checked_entries(config: MapCodecConfig, maps_LNN: Tensor) -> Tensor:
    """`[L, E]`: the entries of `[L, N, N]` float32 maps that are to be coded; rows are queries.

    Raises:
        ValueError: If values are NaN, infinite or negative, or lie above the diagonal of a causal codec.
    """
    if maps_LNN.dtype != torch.float32 or maps_LNN.ndim != 3:
        raise ValueError(f"maps are {maps_LNN.dtype} {tuple(maps_LNN.shape)}, expected float32 [L, N, N]")
    entries_LE = pack_entries(maps_LNN, config.causal)
    if config.causal and int(maps_LNN.count_nonzero()) != int(entries_LE.count_nonzero()):
        raise ValueError(
            "maps are not zero above the diagonal, but the codec is causal: image tokens attend in both directions; "
            "set map_codec.causal to false"
        )
    if entries_LE.numel():
        smallest, largest = (float(bound) for bound in entries_LE.aminmax())
        # Either is NaN if any entry is.
        if not 0 <= smallest <= largest < float("inf"):
            raise ValueError("maps hold NaN, infinite or negative values; attention probabilities are in [0, 1]")
    return entries_LE


def encode_entries(config: MapCodecConfig, entries_LE: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Codes `[L, C]` and caps `[L]` of one image's entries from `checked_entries`, on their device.

    float16 keeps a value A within max(A * 2**-11, 2**-25). A sqrt code is round(m * sqrt(min(A, cap) / cap)) with m
    its highest code (255, 15 or 3) and cap = min(max A, cap_factor * (mean + std)) of each map over its whole
    square, rounded up to a multiple of 2**-24. Below the cap the error is at most cap * (2 * sqrt(A / cap) * r + r * r)
    with r = 0.5 / m, so never more than 0.00393, 0.0678 or 0.3612 caps at 8, 4 or 2 bits.
    The first entry of a byte is in its lowest bits.
    """
    config = config.of_size(num_tokens)
    if config.name == "float16":
        return entries_LE.half(), torch.ones(len(entries_LE), device=entries_LE.device)
    mean_L, std_L = map_mean_std(entries_LE, num_tokens**2)
    largest_L = entries_LE.amax(-1) if entries_LE.shape[-1] else entries_LE.new_zeros(len(entries_LE))
    caps_L = torch.minimum(largest_L, (config.cap_factor * (mean_L + std_L)).float())
    caps_L = (caps_L * CAP_GRID).ceil() / CAP_GRID
    # A map of zeros has cap 0; any divisor gives the code 0.
    divisor_L = torch.where(caps_L > 0, caps_L, torch.ones_like(caps_L))
    share_LE = (entries_LE / divisor_L[:, None]).clamp_(max=1.0)
    codes_LE = share_LE.sqrt_().mul_(config.max_code).round_().to(torch.uint8)
    return pack_narrow(codes_LE, config.bits), caps_L


def code_squares(config: MapCodecConfig, codes_LC: Tensor, num_tokens: int) -> Tensor:
    """`[..., E]` float32: values of codes in units of cap / m**2, exact: the code's square, or a float16's value.

    Raises:
        ValueError: If dtype or sizes do not belong to the codec and N.
    """
    dtype = code_dtype(config)
    if codes_LC.dtype != dtype or codes_LC.shape[-1] != config.num_codes(num_tokens):
        raise ValueError(
            f"codes are {codes_LC.dtype} [..., {codes_LC.shape[-1]}], but codec {config.name} stores {dtype} "
            f"[..., {config.num_codes(num_tokens)}] of {num_tokens} image tokens"
        )
    if config.name == "float16":
        return codes_LC.float()
    codes_LE = unpack_narrow(codes_LC, num_entries(num_tokens, config.causal), config.of_size(num_tokens).bits)
    return codes_LE.float().square_()
