"""What makes a window of coded maps exact where it must be: its sink mask, and the mean of each key.

Letters: L captured layers, W windows, N image tokens, E stored entries of one map (`triangle.py`), K pairs of
layers (`moments.py`), H keys in the
corner of one map and Y entries, G bytes of gaps.

Two things spoil the gradient of the loss, and little else does: a flipped mask entry in a late, short column, and
values that err to one side along a column. So each window's mask is computed from the uncoded maps, and of it
those entries are stored which the codes get wrong; and each column is shifted to the exact mean of what it keeps.
Of windows that nobody foresaw at least the exact threshold is known, and the values of the shortest columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from storage.codecs.config import MapCodecConfig
from storage.codecs.maps import EncodedMaps, checked_entries, code_squares, encode_entries
from storage.codecs.moments import layer_moments, window_thresholds
from storage.codecs.sinks import below_threshold, decode_flips, encode_flips, sink_threshold
from storage.codecs.triangle import num_entries, pack_entries, unpack_entries

WindowRows = Sequence[Sequence[int]]
"""Of each window the rows of its layers among the captured ones."""


@dataclass(frozen=True)
class EncodedWindows:
    """What is stored of one image's windows beside the codes of its maps."""

    thresholds_W: Tensor
    """float32, mean + std of each uncoded window map."""
    shifts_WN: Tensor
    """float16, what the kept entries of each key's column lack on average."""
    flips_G: Tensor
    """uint8, see `encode_flips`: where the masks, one after the other, are not what the codes say."""
    means_L: Tensor
    """float32, see `layer_moments`: of the uncoded maps, for windows of which nothing else is stored."""
    covariances_K: Tensor
    """float32, as `means_L`."""
    corners_LY: Tensor
    """float16, the uncoded entries of the last `corner_size` queries and keys, packed as a map of so many tokens."""

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "EncodedWindows":
        """The same on a device."""
        return EncodedWindows(*(part.to(device, non_blocking=non_blocking) for part in vars(self).values()))


def window_rows(layers: Sequence[int], windows: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Rows of each window's layers among `layers`."""
    row_of = {layer: row for row, layer in enumerate(layers)}
    return tuple(tuple(row_of[layer] for layer in window) for window in windows)


def window_means(maps: Tensor, rows: WindowRows) -> Tensor:
    """`[W, ...]` float32 mean of each window over the first dimension of `maps` `[L, ...]`, rounded once."""
    members_WL = _members(rows, len(maps), maps.device)
    sums_WE = members_WL @ maps.flatten(1).double()
    return (sums_WE / members_WL.sum(1, keepdim=True)).float().view(len(rows), *maps.shape[1:])


def encode_image(config: MapCodecConfig, rows: WindowRows, maps_LNN: Tensor) -> tuple[EncodedMaps, EncodedWindows]:
    """All that is stored of one image's maps.

    Args:
        config: The codec.
        rows: The windows.
        maps_LNN: `[L, N, N]` float32 as the teacher had them, any device.

    Returns:
        Codes within the bounds of `encode_entries`; windows that `decode_windows` gives back as it says.

    Raises:
        ValueError: As `checked_entries`.
    """
    num_tokens = maps_LNN.shape[-1]
    entries_LE = checked_entries(config, maps_LNN)
    encoded = encode_entries(config, entries_LE, num_tokens)
    exact_WE = window_means(entries_LE, rows)
    thresholds_W = sink_threshold(exact_WE, num_tokens**2)
    keep_WE = below_threshold(exact_WE, thresholds_W)
    coded_WE, guess_WE = _decoded(config, rows, encoded, thresholds_W, num_tokens)
    lacking_WNN = unpack_entries(exact_WE.sub_(coded_WE).mul_(keep_WE), num_tokens, config.causal)
    kept_WNN = unpack_entries(keep_WE, num_tokens, config.causal)
    shifts_WN = lacking_WNN.sum(-2) / kept_WNN.sum(-2, dtype=torch.int32).clamp(min=1)
    flips_G = encode_flips((guess_WE ^ keep_WE).flatten())
    moments = layer_moments(entries_LE, num_tokens**2)
    first = num_tokens - config.corner_size(num_tokens)
    corners_LY = pack_entries(maps_LNN[:, first:, first:], config.causal).half()
    return encoded, EncodedWindows(thresholds_W, shifts_WN.half(), flips_G, *moments, corners_LY)


def decode_windows(
    config: MapCodecConfig, rows: WindowRows, encoded: EncodedMaps, windows: EncodedWindows, num_tokens: int
) -> tuple[Tensor, Tensor]:
    """The windows' maps and exact sink masks.

    The masks are those of the uncoded maps, bit for bit, on any device. Where they are True, the mean of a column is
    that of the uncoded map within 2**-11 of the column's shift (or 2**-25) and float32 rounding; an entry errs at most
    by twice the largest error that the codes make at a kept entry of its column.

    Args:
        config: The codec the maps were coded with.
        rows: The windows they were coded for.
        encoded: Codes of all captured layers.
        windows: What was stored of the windows, on the same device.
        num_tokens: N.

    Returns:
        `[W, N, N]` float32 maps and `[W, N, N]` bool masks.

    Raises:
        ValueError: If sizes do not belong together.
    """
    if windows.shifts_WN.shape != (len(rows), num_tokens) or windows.thresholds_W.shape != (len(rows),):
        raise ValueError(
            f"thresholds {tuple(windows.thresholds_W.shape)} and shifts {tuple(windows.shifts_WN.shape)} do not belong "
            f"to {len(rows)} windows of {num_tokens} image tokens"
        )
    coded_WE, keep_WE = _decoded(config, rows, encoded, windows.thresholds_W, num_tokens)
    flips = decode_flips(windows.flips_G, keep_WE.numel())
    flat = keep_WE.view(-1)
    flat[flips] = ~flat[flips]
    maps_WNN = unpack_entries(coded_WE, num_tokens, config.causal)
    keep_WNN = unpack_entries(keep_WE, num_tokens, config.causal)
    return maps_WNN.addcmul_(windows.shifts_WN.float()[:, None, :], keep_WNN.float()), keep_WNN


def estimate_windows(
    config: MapCodecConfig, rows: WindowRows, encoded: EncodedMaps, windows: EncodedWindows, num_tokens: int
) -> tuple[Tensor, Tensor]:
    """Maps and masks of windows that are not stored: decoded maps, compared with the exact threshold.

    Maps are within the bounds of `encode_entries`, and within those of float16 in the corner, where one wrong mask
    entry is much of a column. Elsewhere a mask errs where the codes pass the threshold, and where a value was cut at
    its layer's cap and the mean with it is not above the threshold: that is kept, which does less harm than to leave
    out what belongs in. In a causal map only what lies above the diagonal is taken for 0, since small values have
    the code 0 too; in a square one cannot tell, and every decoded 0 is.

    Args and returns as for `decode_windows`, whose windows may be others.
    """
    thresholds_W = window_thresholds(rows, windows.means_L, windows.covariances_K)
    coded_WE, keep_WE = _decoded(config, rows, encoded, thresholds_W, num_tokens)
    if not config.causal:
        keep_WE &= coded_WE > 0
    maps_WNN = unpack_entries(coded_WE, num_tokens, config.causal)
    keep_WNN = unpack_entries(keep_WE, num_tokens, config.causal)
    size = config.corner_size(num_tokens)
    first = num_tokens - size
    corner_WHH = unpack_entries(window_means(windows.corners_LY, rows), size, config.causal)
    maps_WNN[:, first:, first:] = corner_WHH
    keep_WNN[:, first:, first:] = (corner_WHH <= thresholds_W[:, None, None]).tril()
    return maps_WNN, keep_WNN


def num_mask_entries(config: MapCodecConfig, num_windows: int, num_tokens: int) -> int:
    """Entries of all masks of one image, among which the flips are counted."""
    return num_windows * num_entries(num_tokens, config.causal)


def _decoded(
    config: MapCodecConfig, rows: WindowRows, encoded: EncodedMaps, thresholds_W: Tensor, num_tokens: int
) -> tuple[Tensor, Tensor]:
    """Window means of the codes, `[W, E]` float32, and which of them are not above the threshold.

    The sums are of whole multiples of 2**-24, below 2**53 of them, and so is the threshold's side: in float64 nothing
    is rounded, whatever the order of the sum, and every machine makes the same comparison.
    """
    members_WL = _members(rows, len(encoded.caps_L), encoded.caps_L.device)
    squares_LE = code_squares(config, encoded.codes_LC, num_tokens).double()
    sums_WE = (members_WL * encoded.caps_L.double()) @ squares_LE
    units_W = members_WL.sum(1) * config.max_code**2
    guess_WE = sums_WE <= (units_W * thresholds_W.double())[:, None]
    return sums_WE.div_(units_W[:, None]).float(), guess_WE


def _members(rows: WindowRows, num_layers: int, device: torch.device) -> Tensor:
    """`[W, L]` float64, 1 where a layer is in a window."""
    members_WL = torch.zeros(len(rows), num_layers, dtype=torch.float64)
    for window, members in enumerate(rows):
        members_WL[window, list(members)] = 1
    return members_WL.to(device)
