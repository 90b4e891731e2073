"""Codes of attention maps: 16-bit floats, or 8 bits spaced by square roots up to a cap.

Letters: L layers, N image tokens, E stored entries of one map (`triangle.py`).

The cosine loss averages hundreds of entries of each key, so cheap values do no harm; which entries count as
sinks must be exact, and is stored apart (`sinks.py`). Values above the cap are sinks in almost any window.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from storage.codecs.sinks import map_mean_std
from storage.codecs.triangle import num_entries, pack_entries, unpack_entries

MAX_CODE = 255


class MapCodecConfig(BaseModel):
    """How maps are coded; its dict stands in the manifest and is all a reader needs to decode."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["float16", "sqrt8"]
    """`float16` is exact to rounding; `sqrt8` is half the size and leaves the loss's gradient the same to
    1e-4."""
    causal: bool = True
    """Store the lower triangle only; False for models whose image tokens attend in both directions."""
    cap_factor: float = Field(default=3.0, gt=0, allow_inf_nan=False)
    """sqrt8 only: values are cut at this many times the sink threshold (mean + std) of their map. 1 would be too
    low: a window averages several layers, and one of them may lie above its threshold where the mean does not."""

    @property
    def bits(self) -> int:
        """Bits of one stored entry."""
        return 16 if self.name == "float16" else 8

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the stored codes."""
        return torch.float16 if self.name == "float16" else torch.uint8

    def num_codes(self, num_tokens: int) -> int:
        """Stored elements of one layer of one map."""
        return num_entries(num_tokens, self.causal)


@dataclass(frozen=True)
class EncodedMaps:
    """One image's maps as stored."""

    codes_LE: Tensor
    """uint8 (sqrt8) or float16."""
    caps_L: Tensor
    """float32; the value of the highest code (sqrt8), 1 (float16)."""


def encode_maps(config: MapCodecConfig, maps_LNN: Tensor) -> EncodedMaps:
    """Code the maps of one image.

    float16 keeps a value A within max(A * 2**-11, 2**-25). sqrt8 stores round(255 * sqrt(min(A, cap) /
    cap)) with cap = min(max A, cap_factor * (mean + std)) of each map over its whole square; below the cap
    the error is at most cap * (2 * sqrt(A / cap) * r + r * r) with r = 0.5 / 255, so never more than
    0.00393 cap.

    Args:
        config: The codec.
        maps_LNN: `[L, N, N]` float32, non-negative, rows are queries; any device.

    Returns:
        Codes and caps on the same device.

    Raises:
        ValueError: For NaN, infinite or negative values, and for values above the diagonal of a causal codec.
    """
    if maps_LNN.dtype != torch.float32 or maps_LNN.ndim != 3:
        raise ValueError(f"maps are {maps_LNN.dtype} {tuple(maps_LNN.shape)}, expected float32 [L, N, N]")
    entries_LE = pack_entries(maps_LNN, config.causal)
    _check_values(config, maps_LNN)
    if config.name == "float16":
        caps_L = torch.ones(len(maps_LNN), dtype=torch.float32, device=maps_LNN.device)
        return EncodedMaps(entries_LE.half(), caps_L)
    mean_L, std_L = map_mean_std(maps_LNN)
    limit_L = (config.cap_factor * (mean_L + std_L)).float()
    largest_L = entries_LE.amax(-1) if entries_LE.shape[-1] else torch.zeros_like(limit_L)
    caps_L = torch.minimum(largest_L, limit_L)
    # A map of zeros has cap 0; any divisor gives the code 0.
    divisor_L = torch.where(caps_L > 0, caps_L, torch.ones_like(caps_L))
    share_LE = (entries_LE / divisor_L[:, None]).clamp(max=1.0)
    return EncodedMaps((share_LE.sqrt() * MAX_CODE).round().to(torch.uint8), caps_L)


def decode_maps(config: MapCodecConfig, codes_LE: Tensor, caps_L: Tensor, num_tokens: int) -> Tensor:
    """The maps of one image, within the bounds stated at `encode_maps`.

    Args:
        config: The codec the codes were made with.
        codes_LE: `[..., L, E]` uint8 or float16, any device; leading sizes (a batch) are allowed.
        caps_L: `[..., L]` float32.
        num_tokens: N.

    Returns:
        `[..., L, N, N]` float32 on the codes' device.

    Raises:
        ValueError: If dtype or sizes do not belong to the codec and N.
    """
    if codes_LE.dtype != config.dtype:
        raise ValueError(f"codes are {codes_LE.dtype}, but codec {config.name} stores {config.dtype}")
    values_LE = codes_LE.float()
    if config.name == "sqrt8":
        values_LE = (values_LE / MAX_CODE).square() * caps_L[..., None].float()
    return unpack_entries(values_LE, num_tokens, config.causal)


def _check_values(config: MapCodecConfig, maps_LNN: Tensor) -> None:
    if not bool(torch.isfinite(maps_LNN).all()) or bool((maps_LNN < 0).any()):
        raise ValueError("maps hold NaN, infinite or negative values; attention probabilities are in [0, 1]")
    if config.causal and bool(maps_LNN.triu(1).any()):
        raise ValueError(
            "maps are not zero above the diagonal, but the codec is causal: "
            "this model's image tokens attend in both directions, set map_codec.causal to false"
        )
