"""What maps of cells of 2x2 image tokens take, and where the loss on them pulls a student: beside maps of tokens.

Bytes are as the store writes them, in a shard of all samples. The gradient is that of `attention_codes`, of the loss on
cells with coded maps, compared with that of the loss on tokens with maps that are not coded; `of_cells` compares it
with the loss on cells with maps that are not coded. Maps are synthetic ones of a square of tokens that lacks its
first, and those of the bundled teacher.

    python -m benchmarks.map_pooling
"""

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.attention_codes import CODECS, query_gradients, stored_bytes
from benchmarks.attention_maps import MapSet, bundled_teacher_maps, synthetic_maps
from benchmarks.results import RESULTS, command_line, save_result
from stages.families.token_grids import TokenGrid, token_cells
from storage.codecs.attention_maps import MapCodec
from storage.codecs.codec_settings import MapCodecConfig
from storage.codecs.sinks import sink_keep_mask
from storage.codecs.token_cells import TokenCells
from storage.codecs.windows import window_means, window_rows

SIDE = 2


def measure(data: MapSet) -> dict[str, Any]:
    """Every codec, with maps of tokens and of cells."""
    num_tokens, rows = data.maps[0].shape[-1], window_rows(data.layers, data.windows)
    side = math.isqrt(num_tokens + 1)
    cells_X = token_cells([TokenGrid(side, side, side * side - num_tokens)], SIDE)
    cells = TokenCells.of(cells_X)
    pooled = [torch.stack([cells.pooled(map_XX) for map_XX in maps_LXX]) for maps_LXX in data.maps]
    exact = [window_means(maps, rows) for maps in data.maps]
    of_tokens = [query_gradients(maps, sink_keep_mask(maps), seed) for seed, maps in enumerate(exact)]
    exact_cells = [window_means(maps, rows) for maps in pooled]
    of_cells = [query_gradients(maps, sink_keep_mask(maps), seed, cells=cells) for seed, maps in enumerate(exact_cells)]
    results: dict[str, Any] = {}
    for name in CODECS:
        plain = MapCodec(MapCodecConfig(name=name), rows)
        square = MapCodec(MapCodecConfig(name=name, causal=False), rows)
        coded = [square.encode(maps, cells_X) for maps in pooled]
        found = [query_gradients(*square.decode_windows(one), seed, cells=cells) for seed, one in enumerate(coded)]
        bytes_of_tokens = sum(stored_bytes(plain.config, data, [plain.encode(maps) for maps in data.maps]).values())
        bytes_of_cells = sum(stored_bytes(square.config, data, coded, SIDE).values())
        results[name] = {
            "bytes_of_tokens": round(bytes_of_tokens),
            "bytes_of_cells": round(bytes_of_cells),
            "smaller": bytes_of_tokens / bytes_of_cells,
            "gradient_cosine_of_tokens": _cosines(of_tokens, found),
            "gradient_cosine_of_cells": _cosines(of_cells, found),
        }
    return {
        "samples": len(data.maps),
        "image_tokens": num_tokens,
        "cells": len(cells),
        "layers": data.layers,
        "gradient_cosine_of_tokens_uncoded": _cosines(of_tokens, of_cells),
        "codecs": results,
    }


def _cosines(expected: list[torch.Tensor], found: list[torch.Tensor]) -> dict[str, float]:
    pairs = list(zip(expected, found, strict=True))
    whole = [float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)) for a, b in pairs]
    worst = min(float(torch.cosine_similarity(a, b, dim=1).min()) for a, b in pairs)
    return {"layers_median": statistics.median(whole), "worst_layer": worst}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-tokens", type=int, default=728, help="one less than a square")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--scenes", type=int, default=16, help="samples of the bundled teacher")
    parser.add_argument("--out", type=Path, default=RESULTS / "map_pooling.json")
    flags = parser.parse_args()
    result = {
        "synthetic": measure(synthetic_maps(flags.image_tokens, flags.samples)),
        "scenes": measure(bundled_teacher_maps(flags.scenes)),
    }
    save_result(flags.out, torch.device("cpu"), command_line("benchmarks.map_pooling"), result)
    print(flags.out.read_text())


if __name__ == "__main__":
    main()
