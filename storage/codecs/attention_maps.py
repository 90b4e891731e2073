"""The codec of one image's attention maps, with exact sink masks and key means of the stored windows.

Two errors spoil the gradient of the loss, and little else does: a flipped mask entry in a late, short column, and
values that err to one side along a column. So each window's mask is computed from the uncoded maps, and the entries
that the codes get wrong are stored; and each column is shifted to the exact mean of what it keeps. Of windows that are
not stored, the exact threshold is known at least. Values of the shortest columns are stored as 16-bit floats: a
student's mask leaves little to average there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from storage.codecs.codec_settings import MapCodecConfig, num_entries
from storage.codecs.map_entries import checked_entries, code_dtype, code_squares, encode_entries
from storage.codecs.moments import layer_moments, window_thresholds
from storage.codecs.sinks import below_threshold, decode_flips, encode_flips, sink_threshold
from storage.codecs.token_cells import attended_cells, cells_fault
from storage.codecs.triangle import pack_entries, unpack_entries
from storage.codecs.windows import EncodedWindows, WindowRows, window_means, window_members, window_rows

MAX_THRESHOLD_ERROR = 2.0**-12
"""Between a stored threshold and that of the moments: far above rounding, far below what windows differ by."""


@dataclass(frozen=True)
class EncodedMaps:
    """The attention maps of one image after one prefix, as stored; several samples may share them."""

    num_tokens: int
    """N: image tokens, or cells of them."""
    codes_LC: Tensor
    """uint8 (sqrt codes) or float16."""
    caps_L: Tensor
    """float32; the value of the highest code, 1 for float16."""
    windows: EncodedWindows | None
    """What makes the stored windows exact; None where only some of the layers were read."""
    cells_X: Tensor | None = None
    """int32, the cell of each image token, where maps are of cells (`token_cells.py`); image tokens are causal then."""

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "EncodedMaps":
        """The same on a device."""
        codes_LC, caps_L = (part.to(device, non_blocking=non_blocking) for part in (self.codes_LC, self.caps_L))
        windows = None if self.windows is None else self.windows.to(device, non_blocking=non_blocking)
        cells_X = None if self.cells_X is None else self.cells_X.to(device, non_blocking=non_blocking)
        return EncodedMaps(self.num_tokens, codes_LC, caps_L, windows, cells_X)


@dataclass(frozen=True)
class MapCodec:
    """Codes the maps of the captured layers of one image, and decodes them as layers or as windows."""

    config: MapCodecConfig
    stored_windows: WindowRows = ()
    """The windows whose masks and key means are stored."""

    @classmethod
    def of_layers(cls, config: MapCodecConfig, layers: Sequence[int], windows: Sequence[Sequence[int]]) -> Self:
        """The codec of captured `layers`, with windows given by layer numbers."""
        return cls(config, window_rows(layers, windows))

    def encode(self, maps_LNN: Tensor, cells_X: Tensor | None = None) -> EncodedMaps:
        """All that is stored of one image's float32 maps, as the teacher had them.

        Of maps of cells, `cells_X` is the cell of each image token.

        Layers are within the bounds of `encode_entries`, windows within those of `decode_windows`.

        Raises:
            ValueError: As `checked_entries`.
        """
        config, rows, num_tokens = self.config, self.stored_windows, maps_LNN.shape[-1]
        entries_LE = checked_entries(config, maps_LNN)
        codes_LC, caps_L = encode_entries(config, entries_LE, num_tokens)
        encoded = EncodedMaps(num_tokens, codes_LC, caps_L, None, cells_X)
        exact_WE = window_means(entries_LE, rows)
        thresholds_W = sink_threshold(exact_WE, num_tokens**2)
        keep_WE = below_threshold(exact_WE, thresholds_W)
        coded_WE, guess_WE = self._decode_means(encoded, rows, thresholds_W)
        first = num_tokens - config.tail_block_size(num_tokens)
        tail_blocks_LY = pack_entries(maps_LNN[:, first:, first:], config.causal).half()
        exact_WNN = unpack_entries(exact_WE, num_tokens, config.causal)
        kept_WNN = unpack_entries(keep_WE, num_tokens, config.causal)
        lacking_WNN = exact_WNN.sub_(self._with_tail_blocks(coded_WE, tail_blocks_LY, rows, num_tokens)).mul_(kept_WNN)
        shifts_WN = lacking_WNN.sum(-2) / kept_WNN.sum(-2, dtype=torch.int32).clamp(min=1)
        flips_G = encode_flips((guess_WE ^ keep_WE).flatten())
        moments = layer_moments(entries_LE, num_tokens**2)
        windows = EncodedWindows(thresholds_W, shifts_WN.half(), flips_G, *moments, tail_blocks_LY)
        return EncodedMaps(num_tokens, codes_LC, caps_L, windows, cells_X)

    def decode(self, encoded: EncodedMaps) -> Tensor:
        """`[..., L, N, N]` float32 maps of the layers, within the bounds of `encode_entries`.

        Codes `[..., L, C]` and caps `[..., L]` may have leading sizes (a batch).

        Raises:
            ValueError: If dtype or sizes do not belong to the codec and N.
        """
        squares_LE = code_squares(self.config, encoded.codes_LC, encoded.num_tokens)
        max_code = self.config.of_size(encoded.num_tokens).max_code
        values_LE = squares_LE * (encoded.caps_L.float() / max_code**2)[..., None]
        return unpack_entries(values_LE, encoded.num_tokens, self.config.causal)

    def decode_windows(self, encoded: EncodedMaps) -> tuple[Tensor, Tensor]:
        """The stored windows' maps, `[W, N, N]` float32, and exact sink masks, `[W, N, N]` bool.

        The masks are those of the uncoded maps, bit for bit, on any device. Where they are True, the mean of a column
        is that of the uncoded map within 2**-11 of the column's shift (or 2**-25) and float32 rounding; an entry errs
        at most by twice the largest error that the codes make at a kept entry of its column.

        Raises:
            ValueError: If sizes do not belong together, or the windows were not read.
        """
        rows, windows, num_tokens = self.stored_windows, _windows_of(encoded), encoded.num_tokens
        if windows.shifts_WN.shape != (len(rows), num_tokens) or windows.thresholds_W.shape != (len(rows),):
            raise ValueError(
                f"thresholds {tuple(windows.thresholds_W.shape)} and shifts {tuple(windows.shifts_WN.shape)} do not "
                f"belong to {len(rows)} windows of {num_tokens} image tokens"
            )
        coded_WE, keep_WE = self._decode_means(encoded, rows, windows.thresholds_W)
        flat = keep_WE.view(-1)
        flat[self.decode_flips(encoded)] ^= True
        maps_WNN = self._with_tail_blocks(coded_WE, windows.tail_blocks_LY, rows, num_tokens)
        keep_WNN = unpack_entries(keep_WE, num_tokens, self.config.causal)
        return maps_WNN.addcmul_(windows.shifts_WN.float()[:, None, :], keep_WNN.float()), keep_WNN

    def decode_flips(self, encoded: EncodedMaps) -> Tensor:
        """Positions, among the entries of all stored masks, where the codes alone give the wrong mask.

        Raises:
            ValueError: If a position lies past the masks, or the windows were not read.
        """
        count = len(self.stored_windows) * num_entries(encoded.num_tokens, self.config.causal)
        return decode_flips(_windows_of(encoded).flips_G, count)

    def check(self, encoded: EncodedMaps) -> None:
        """Makes sure that the parts belong to each other, to the codec and to the stored windows.

        Raises:
            ValueError: If type or size of a part are others, a value is not finite, a threshold is not that of the
                moments, a flip lies past the masks, or cells are not those of the map.
        """
        windows, num_tokens, num_layers = _windows_of(encoded), encoded.num_tokens, len(encoded.caps_L)
        if num_tokens < 1:
            raise ValueError(f"{num_tokens} tokens, expected at least 1")
        tail_block = num_entries(self.config.tail_block_size(num_tokens), self.config.causal)
        num_windows = len(self.stored_windows)
        expected = {
            "codes": (encoded.codes_LC, (num_layers, self.config.num_codes(num_tokens))),
            "thresholds": (windows.thresholds_W, (num_windows,)),
            "shifts": (windows.shifts_WN, (num_windows, num_tokens)),
            "means": (windows.means_L, (num_layers,)),
            "covariances": (windows.covariances_P, (num_entries(num_layers, causal=True),)),
            "tail_blocks": (windows.tail_blocks_LY, (num_layers, tail_block)),
        }
        for name, (part, shape) in expected.items():
            if part.shape != shape:
                raise ValueError(f"{name} of {tuple(part.shape)}, expected {shape}")
        if encoded.codes_LC.dtype != code_dtype(self.config):
            raise ValueError(f"codes of {encoded.codes_LC.dtype}, expected {code_dtype(self.config)}")
        parts = [encoded.caps_L, *(part for part, _ in expected.values())]
        if not all(bool(torch.isfinite(part).all()) for part in parts if part.is_floating_point()):
            raise ValueError("NaN or infinite values")
        thresholds_W = window_thresholds(self.stored_windows, windows.means_L, windows.covariances_P)
        if bool(((thresholds_W - windows.thresholds_W).abs() > MAX_THRESHOLD_ERROR).any()):
            raise ValueError(f"thresholds {windows.thresholds_W.tolist()}, moments give {thresholds_W.tolist()}")
        if encoded.cells_X is not None and (bad := cells_fault(encoded.cells_X, num_tokens)):
            raise ValueError(bad)
        self.decode_flips(encoded)

    def estimate_windows(self, encoded: EncodedMaps, rows: WindowRows) -> tuple[Tensor, Tensor]:
        """As `decode_windows`, of windows that are not stored: decoded maps, compared with the exact threshold.

        Maps are within the bounds of `encode_entries`, and within those of float16 in the tail block, where one wrong
        mask entry is much of a column. Elsewhere a mask errs where the codes pass the threshold. It also errs where a
        value was cut at its layer's cap and the mean with it is not above the threshold: that entry is kept, which does
        less harm than to leave out what belongs in. In a causal map only what no query can see is taken for 0, since
        small values have the code 0 too; in another one cannot tell, and every decoded 0 is.

        Raises:
            ValueError: If the windows were not read.
        """
        windows, num_tokens, causal = _windows_of(encoded), encoded.num_tokens, self.config.causal
        thresholds_W = window_thresholds(rows, windows.means_L, windows.covariances_P)
        coded_WE, keep_WE = self._decode_means(encoded, rows, thresholds_W)
        if not causal and encoded.cells_X is None:
            keep_WE &= coded_WE > 0
        maps_WNN = self._with_tail_blocks(coded_WE, windows.tail_blocks_LY, rows, num_tokens)
        keep_WNN = unpack_entries(keep_WE, num_tokens, causal)
        if size := self.config.tail_block_size(num_tokens):
            tail = slice(num_tokens - size, None)
            keep_WNN[:, tail, tail] = (maps_WNN[:, tail, tail] <= thresholds_W[:, None, None]).tril()
        return maps_WNN, keep_WNN

    def _with_tail_blocks(self, coded_WE: Tensor, tail_blocks_LY: Tensor, rows: WindowRows, num_tokens: int) -> Tensor:
        """`[W, N, N]` means of the codes, with those of the tail blocks in their place."""
        maps_WNN = unpack_entries(coded_WE, num_tokens, self.config.causal)
        if size := self.config.tail_block_size(num_tokens):
            tail_WZZ = unpack_entries(window_means(tail_blocks_LY, rows), size, self.config.causal)
            maps_WNN[:, -size:, -size:] = tail_WZZ
        return maps_WNN

    def _decode_means(self, encoded: EncodedMaps, rows: WindowRows, thresholds_W: Tensor) -> tuple[Tensor, Tensor]:
        """Window means of the codes, `[W, E]` float32, and which of them are not above the threshold.

        Of a map of cells only entries that a query can see are said not to be.

        The sums are of whole multiples of 2**-24, below 2**53 of them. The other side is a float32 (24 bits) times an
        integer below 2**29. So float64 rounds neither, whatever the order of the sum, and every machine makes the same
        comparison.
        """
        members_WL = window_members(rows, len(encoded.caps_L), encoded.caps_L.device)
        squares_LE = code_squares(self.config, encoded.codes_LC, encoded.num_tokens).double()
        sums_WE = (members_WL * encoded.caps_L.double()) @ squares_LE
        units_W = members_WL.sum(1) * self.config.of_size(encoded.num_tokens).max_code ** 2
        guess_WE = sums_WE <= (units_W * thresholds_W.double())[:, None]
        if encoded.cells_X is not None:
            guess_WE &= pack_entries(attended_cells(encoded.cells_X), self.config.causal)
        return sums_WE.div_(units_W[:, None]).float(), guess_WE


def _windows_of(encoded: EncodedMaps) -> EncodedWindows:
    if encoded.windows is None:
        raise ValueError("the maps were read without their windows; read all captured layers")
    return encoded.windows
