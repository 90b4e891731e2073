"""What codes of maps do to variants of the attention loss: cosine between the gradient with coded and uncoded maps.

The gradient is that of `attention_codes`. Of each variant of the loss, the windows are those that the store foresaw,
but for one teacher layer each, whose masks are made from decoded maps.

    python -m benchmarks.attention_variants
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention_codes import CODECS, query_gradients
from benchmarks.attention_maps import MapSet, bundled_teacher_maps, synthetic_maps
from benchmarks.results import RESULTS, command_line, save_result
from stages.attention.layer_selection import single_layers
from storage.codecs.attention_maps import MapCodec
from storage.codecs.codec_settings import MapCodecConfig
from storage.codecs.sinks import sink_keep_mask
from storage.codecs.windows import window_means, window_rows

VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {},
    "kl": {"kind": "kl"},
    "mse": {"kind": "mse"},
    "sinks left in": {"sink_mask": False},
    "sinks left in, kl": {"sink_mask": False, "kind": "kl"},
    "one teacher layer each": {},
}


def measure(data: MapSet) -> dict[str, Any]:
    """By codec and variant: median and least cosine over samples, all matched layers as one vector."""
    found: dict[str, Any] = {}
    for name in CODECS:
        config = MapCodecConfig(name=name)
        cosines: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for seed, maps_LNN in enumerate(data.maps):
            for variant, loss in VARIANTS.items():
                expected, coded = _gradients(config, data, maps_LNN, variant, loss, seed)
                cosines[variant].append(float(torch.cosine_similarity(expected, coded, dim=0)))
        found[name] = {
            variant: {"median": statistics.median(values), "least": min(values)} for variant, values in cosines.items()
        }
    return {"samples": len(data.maps), "layers": data.layers, "windows": data.windows, **found}


def _gradients(
    config: MapCodecConfig, data: MapSet, maps_LNN: Tensor, variant: str, loss: dict[str, Any], seed: int
) -> tuple[Tensor, Tensor]:
    """With uncoded and with coded maps."""
    rows = window_rows(data.layers, data.windows)
    codec = MapCodec(config, rows)
    image = codec.encode(maps_LNN)
    if variant == "one teacher layer each":
        rows = window_rows(data.layers, single_layers(tuple(data.layers), len(data.windows)))
        maps_WNN, keep_WNN = codec.estimate_windows(image, rows)
    else:
        maps_WNN, keep_WNN = codec.decode_windows(image)
    exact_WNN = window_means(maps_LNN, rows)
    exact_keep_WNN = sink_keep_mask(exact_WNN)
    if not loss.get("sink_mask", True):
        exact_keep_WNN, keep_WNN = exact_WNN > 0, torch.ones_like(keep_WNN).tril()
    return (
        query_gradients(exact_WNN, exact_keep_WNN, seed, **loss).flatten(),
        query_gradients(maps_WNN, keep_WNN, seed, **loss).flatten(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-tokens", type=int, default=728)
    parser.add_argument("--samples", type=int, default=3, help="synthetic samples")
    parser.add_argument("--scenes", type=int, default=64, help="samples of the bundled teacher")
    parser.add_argument("--out", type=Path, default=RESULTS / "attention_variants.json")
    flags = parser.parse_args()
    result = {
        "synthetic": measure(synthetic_maps(flags.image_tokens, flags.samples)),
        "scenes": measure(bundled_teacher_maps(flags.scenes)),
    }
    save_result(flags.out, torch.device("cpu"), command_line("benchmarks.attention_variants"), result)
    print(flags.out.read_text())


if __name__ == "__main__":
    main()
