"""What was tried for attention codes and not kept: other coders, other masks, other values, on one synthetic sample.

`python -m benchmarks.attention_codes` has all of it in its results. This file alone measures the coders, of which two
need packages of their own (`pip install -c constraints.txt -e '.[benchmarks]'`):

    python -m benchmarks.attention_alternatives

Letters: L captured layers, W windows, N image tokens, E entries of a causal map, C bytes of its codes.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numcodecs import Zstd
from torch import Tensor

try:
    import zstandard
    from numcodecs.pcodec import PCodec
except ImportError as error:
    raise ImportError(
        f"{error.name} is not installed, and a table without its rows would look complete; this needs pcodec and "
        "zstandard: pip install -c constraints.txt -e '.[benchmarks]'"
    ) from error

from benchmarks.attention_maps import MapSet, synthetic_maps
from benchmarks.results import RESULTS, command_line, median_ratio, save_result
from storage.codecs.attention_maps import MapCodec
from storage.codecs.codec_settings import MapCodecConfig
from storage.codecs.map_entries import code_squares
from storage.codecs.sinks import map_mean_std, sink_keep_mask
from storage.codecs.triangle import pack_entries, unpack_entries
from storage.codecs.windows import window_means, window_rows

QueryGradients = Callable[[Tensor, Tensor, int], Tensor]
_Array = np.ndarray[Any, Any]
PCODEC_LEVELS = (8, 12)
"""Its default and its highest."""
DICTIONARY_BYTES = 112_640
"""What the zstd command makes by default."""
PIECE_BYTES = 8192
"""Of the samples that a dictionary is made of: they should be many."""


def measure_alternatives(data: MapSet, query_gradients: QueryGradients) -> dict[str, Any]:
    """Sizes and exactness on the first sample, beside what is stored of it at 4 bits."""
    maps_LNN, config = data.maps[0], MapCodecConfig(name="sqrt4")
    return {
        "coders_of_4_bit_codes": coders(config, maps_LNN, data.maps[1:]),
        "masks_at_4_bits": masks(config, data, maps_LNN),
        "values": values(data, maps_LNN, query_gradients),
    }


def coders(config: MapCodecConfig, maps_LNN: Tensor, others: Sequence[Tensor]) -> dict[str, dict[str, float]]:
    """Bytes of all layers' codes and time to decompress them, for each way to order and to compress them.

    Args:
        config: The codec.
        maps_LNN: One sample's maps.
        others: Maps of other samples, which a dictionary is made of.
    """
    packed_LC = MapCodec(config).encode(maps_LNN).codes_LC
    codes_LE = code_squares(config, packed_LC, maps_LNN.shape[-1]).sqrt().to(torch.uint8)
    codes_LNN = unpack_entries(codes_LE, maps_LNN.shape[-1], causal=True)
    row_above = torch.cat([torch.zeros_like(codes_LNN[:, :1]), codes_LNN[:, :-1]], 1)
    row_deltas_LE = pack_entries(codes_LNN - row_above & 15, causal=True)
    of_layer_before = torch.cat([torch.zeros_like(codes_LE[:1]), codes_LE[:-1]])
    stored: list[_Array] = list(packed_LC.numpy())
    found = {
        "zstd 1, as stored": _compressed(Zstd(level=1), stored),
        "zstd 3": _compressed(Zstd(level=3), stored),
        "zstd 9": _compressed(Zstd(level=9), stored),
        "zstd 19": _compressed(Zstd(level=19), stored),
        "row less the row above": _compressed(Zstd(level=1), _nibbles(row_deltas_LE)),
        "layer less the layer before": _compressed(Zstd(level=1), _nibbles(codes_LE - of_layer_before & 15)),
        "bit planes": _compressed(Zstd(level=1), _bit_planes(codes_LE)),
        "one code a byte": _compressed(Zstd(level=1), list(codes_LE.numpy())),
    }
    found |= _pcodec(codes_LE)
    found |= _zstd_with_dictionary(stored, [MapCodec(config).encode(maps).codes_LC.numpy() for maps in others])
    reference = found["zstd 1, as stored"][1]
    results = {
        name: {"bytes": size, "decompress_over_stored": median_ratio(seconds, reference)}
        for name, (size, seconds) in found.items()
    }
    results["entropy of single codes"] = {"bytes": sum(_entropy_bytes(codes_E) for codes_E in codes_LE)}
    results["entropy given the codes left and above"] = {"bytes": _context_bytes(codes_LNN)}
    return results


def _pcodec(codes_LE: Tensor) -> dict[str, tuple[int, list[float]]]:
    parts: list[_Array] = list(codes_LE.numpy().astype(np.uint16))
    return {f"pcodec {level}, one code in 16 bits": _compressed(PCodec(level=level), parts) for level in PCODEC_LEVELS}


def _zstd_with_dictionary(parts: list[_Array], others: Sequence[_Array]) -> dict[str, tuple[int, list[float]]]:
    """With a dictionary of other samples' codes; it is stored once, so its own bytes are not counted.

    Nothing where there is no other sample.
    """
    pieces = [
        codes[start : start + PIECE_BYTES].tobytes()
        for codes_LC in others
        for codes in codes_LC
        for start in range(0, len(codes), PIECE_BYTES)
    ]
    if not pieces:
        return {}
    dictionary = zstandard.train_dictionary(min(DICTIONARY_BYTES, sum(map(len, pieces)) // 8), pieces)
    reader = zstandard.ZstdDecompressor(dict_data=dictionary)
    return {
        f"zstd {level}, dictionary of other samples": _timed(
            [zstandard.ZstdCompressor(level=level, dict_data=dictionary).compress(part.tobytes()) for part in parts],
            reader.decompress,
        )
        for level in (1, 19)
    }


def masks(config: MapCodecConfig, data: MapSet, maps_LNN: Tensor) -> dict[str, float]:
    """Bytes of all windows' exact masks, after zstd."""
    rows = window_rows(data.layers, data.windows)
    codec = MapCodec(config, rows)
    encoded = codec.encode(maps_LNN)
    windows = encoded.windows
    assert windows is not None
    keep_WE = pack_entries(sink_keep_mask(window_means(maps_LNN, rows)), causal=True)
    coded_WE = pack_entries(window_means(codec.decode(encoded), rows), causal=True)
    flips_WE = keep_WE ^ (coded_WE <= windows.thresholds_W[:, None])
    return {
        "a bit an entry": _compressed(Zstd(level=1), _bits(keep_WE))[0],
        "a bit an entry, less what the codes say": _compressed(Zstd(level=1), _bits(flips_WE))[0],
        "gaps between flips, as stored": _compressed(Zstd(level=1), [windows.flips_G.numpy()])[0],
        "share of entries that are flips": float(flips_WE.float().mean()),
    }


def values(data: MapSet, maps_LNN: Tensor, query_gradients: QueryGradients) -> dict[str, dict[str, float]]:
    """Cosine of the gradient (all layers, worst layer) and size of the codes for other values, with exact masks."""
    rows = window_rows(data.layers, data.windows)
    exact_WNN = window_means(maps_LNN, rows)
    keep_WNN = sink_keep_mask(exact_WNN)
    expected = query_gradients(exact_WNN, keep_WNN, 0)

    def judged(codes_LNN: Tensor, coded_WNN: Tensor, *, shifted: bool = True) -> dict[str, float]:
        if shifted:
            lacking_WN = ((exact_WNN - coded_WNN) * keep_WNN).sum(-2) / keep_WNN.sum(-2).clamp(min=1)
            coded_WNN = coded_WNN + lacking_WN.half().float()[:, None] * keep_WNN
        found = query_gradients(coded_WNN, keep_WNN, 0)
        of_layers = torch.cosine_similarity(expected, found, dim=1)
        return {
            "gradient_cosine": float(torch.cosine_similarity(expected.flatten(), found.flatten(), dim=0)),
            "worst_layer": float(of_layers.min()),
            "entropy_bytes_of_codes": sum(_entropy_bytes(codes_E) for codes_E in pack_entries(codes_LNN, causal=True)),
        }

    results = {}
    for bits, factor in ((4, 3.0), (2, 2.0)):
        codes_LNN, decoded_LNN = _quantised(maps_LNN, 2**bits - 1, factor, 0.5)
        coded_WNN = window_means(decoded_LNN, rows)
        results[f"{bits} bits, as stored"] = judged(codes_LNN, coded_WNN)
        results[f"{bits} bits, columns not shifted"] = judged(codes_LNN, coded_WNN, shifted=False)
        below = (decoded_LNN < decoded_LNN.amax((-2, -1), keepdim=True)) & (maps_LNN > 0)
        lacking_LN = ((maps_LNN - decoded_LNN) * below).sum(-2) / below.sum(-2).clamp(min=1)
        by_layer = window_means(decoded_LNN + lacking_LN[:, None] * below, rows)
        results[f"{bits} bits, columns of layers shifted, not of windows"] = judged(codes_LNN, by_layer, shifted=False)
    for name, max_code, factor, power in (
        ("4 bits, cap at 2 (mean + std)", 15, 2.0, 0.5),
        ("4 bits, evenly spaced", 15, 3.0, 1.0),
        ("3 bits", 7, 3.0, 0.5),
        ("2 bits, cap at 3 (mean + std)", 3, 3.0, 0.5),
        ("2 bits, evenly spaced", 3, 2.0, 1.0),
    ):
        codes_LNN, decoded_LNN = _quantised(maps_LNN, max_code, factor, power)
        results[name] = judged(codes_LNN, window_means(decoded_LNN, rows))
    return results


def _quantised(maps_LNN: Tensor, max_code: int, factor: float, power: float) -> tuple[Tensor, Tensor]:
    """Codes and decoded maps for any spacing; `power` 0.5 is by square roots."""
    mean_L, std_L = map_mean_std(maps_LNN.flatten(1), maps_LNN.shape[-1] ** 2)
    caps_L11 = torch.minimum(maps_LNN.amax((-2, -1)), (factor * (mean_L + std_L)).float())[:, None, None]
    codes_LNN = ((maps_LNN / caps_L11).clamp(max=1) ** power * max_code).round()
    return codes_LNN.to(torch.uint8), (codes_LNN / max_code) ** (1 / power) * caps_L11


def _compressed(codec: Any, parts: list[_Array]) -> tuple[int, list[float]]:
    """Bytes of all parts, and seconds to decompress them, three times."""
    return _timed([codec.encode(np.ascontiguousarray(part)) for part in parts], codec.decode)


def _timed(packed: Sequence[bytes], decompress: Callable[[bytes], object]) -> tuple[int, list[float]]:
    seconds = []
    for _ in range(3):
        started = time.thread_time()
        for part in packed:
            decompress(part)
        seconds.append(time.thread_time() - started)
    return sum(len(part) for part in packed), seconds


def _nibbles(codes_LE: Tensor) -> list[_Array]:
    codes_LE = torch.nn.functional.pad(codes_LE, (0, codes_LE.shape[-1] % 2))
    return list((codes_LE[:, ::2] | codes_LE[:, 1::2] << 4).numpy())


def _bit_planes(codes_LE: Tensor) -> list[_Array]:
    return [np.concatenate([np.packbits(codes >> bit & 1) for bit in range(4)]) for codes in codes_LE.numpy()]


def _bits(mask_WE: Tensor) -> list[_Array]:
    return [np.packbits(mask, bitorder="little") for mask in mask_WE.numpy()]


def _entropy_bytes(codes: Tensor) -> float:
    counts = torch.bincount(codes.flatten().long()).double()
    share = counts[counts > 0] / counts.sum()
    return float(-(counts[counts > 0] * share.log2()).sum() / 8)


def _context_bytes(codes_LNN: Tensor) -> float:
    """What no coder that sees only the neighbours left and above can go below, rows and columns of the rim left out."""
    inside = torch.ones(codes_LNN.shape[1:], dtype=torch.bool).tril(-1)
    inside[0] = inside[:, 0] = False
    rows, columns = inside.nonzero(as_tuple=True)
    total = 0.0
    for codes_NN in codes_LNN.long():
        context = codes_NN[rows, columns - 1] * 16 + codes_NN[rows - 1, columns]
        total += _entropy_bytes(context * 16 + codes_NN[rows, columns]) - _entropy_bytes(context)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-tokens", type=int, default=728)
    parser.add_argument("--out", type=Path, default=RESULTS / "attention_coders.json")
    flags = parser.parse_args()
    data = synthetic_maps(flags.image_tokens, num_samples=3)
    result: dict[str, Any] = {"image_tokens": flags.image_tokens, "layers": data.layers}
    result["coders_of_4_bit_codes"] = coders(MapCodecConfig(name="sqrt4"), data.maps[0], data.maps[1:])
    save_result(flags.out, torch.device("cpu"), command_line("benchmarks.attention_alternatives"), result)
    print(flags.out.read_text())


if __name__ == "__main__":
    main()
