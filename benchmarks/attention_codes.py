"""Size, exactness and speed of attention codes: bytes as the store writes them, the loss's gradient, CPU time.

The gradient is that of the query weights of a student's matched layers (4 heads of 16 from one 64-wide input) under the
attention loss, with coded against uncoded maps; "layers" in the results counts all of them as one vector, "worst_layer"
is the least of the matched layers. Times are CPU seconds of one thread for one sample, ratios to the `float16` codec.

    python -m benchmarks.attention_codes
"""

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks.attention_alternatives import measure_alternatives
from benchmarks.attention_maps import TEXT_KEYS, MapSet, bundled_teacher_maps, synthetic_maps
from benchmarks.results import RESULTS, command_line, interleaved, median_ratio, save_result
from stages.attention.layer_selection import sliding_windows
from stages.student.losses.attention import matched_loss
from stages.student.stage_config import AttentionLoss
from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.codecs.attention_maps import EncodedMaps, MapCodec
from storage.codecs.codec_settings import (
    EntryCodecName,
    LogitCodecConfig,
    MapCodecConfig,
    MapCodecName,
    num_entries,
)
from storage.codecs.sinks import sink_keep_mask
from storage.codecs.token_cells import TokenCells
from storage.codecs.windows import window_means, window_rows
from storage.samples.image_settings import ImageConfig
from storage.stores import open_store
from storage.targets.manifest import FORMAT_VERSION, POOLED_FORMAT_VERSION, Fingerprint, Manifest, create_or_check
from storage.targets.sample_targets import SampleTargets
from storage.targets.shard_writer import write_shard

CODECS: tuple[MapCodecName, ...] = get_args(EntryCodecName)
MAP_ARRAYS = ("map_", "window_")
"""What the names of arrays of maps begin with."""


def measure(data: MapSet, repeats: int) -> dict[str, Any]:
    """Every codec on every sample of `data`."""
    rows = window_rows(data.layers, data.windows)
    # As for a student that matches fewer layers than are stored.
    others = window_rows(data.layers, sliding_windows(data.layers, max(1, len(data.windows) - 2)))
    gradients = [_Gradients(maps, seed) for seed, maps in enumerate(data.maps)]
    num_tokens = [maps.shape[-1] for maps in data.maps]
    raw = statistics.mean(2 * len(data.layers) * num_entries(n, causal=True) for n in num_tokens)
    times = _times(data, rows, repeats)
    results: dict[str, Any] = {}
    for name in CODECS:
        config = MapCodecConfig(name=name)
        codec = MapCodec(config, rows)
        coded = [codec.encode(maps) for maps in data.maps]
        stored = stored_bytes(config, data, coded)
        exact = [
            gradient.cosines(rows, codec.decode_windows(image))
            for gradient, image in zip(gradients, coded, strict=True)
        ]
        estimated = [
            gradient.cosines(others, codec.estimate_windows(image, others))
            for gradient, image in zip(gradients, coded, strict=True)
        ]
        total = sum(stored.values())
        results[name] = {
            "bytes_a_sample": round(total),
            "bytes_by_array": {array: round(amount) for array, amount in stored.items()},
            "smaller_than_fp16_triangle": raw / total,
            "gradient_cosine": _summary(exact),
            "gradient_cosine_of_unforeseen_windows": _summary(estimated),
            **{
                f"{action}_over_float16": median_ratio(times[action][name], times[action]["float16"])
                for action in times
            },
            **{f"{action}_cpu_s": statistics.median(times[action][name]) for action in times},
        }
    return {
        "samples": len(data.maps),
        "image_tokens": sorted(set(num_tokens)),
        "layers": data.layers,
        "windows": data.windows,
        "codecs": results,
    }


class _Gradients:
    """The loss's gradient with one sample's uncoded maps, to compare others with."""

    def __init__(self, maps_LNN: Tensor, seed: int) -> None:
        self.maps_LNN, self.seed = maps_LNN, seed
        self._exact: dict[Any, Tensor] = {}

    def cosines(self, rows: Sequence[Sequence[int]], found: tuple[Tensor, Tensor]) -> tuple[float, float]:
        """Of all layers as one vector and of the worst layer, for other maps `[W, N, N]` and masks."""
        key = tuple(map(tuple, rows))
        if key not in self._exact:
            exact_WNN = window_means(self.maps_LNN, rows)
            self._exact[key] = query_gradients(exact_WNN, sink_keep_mask(exact_WNN), self.seed)
        expected, gradient = self._exact[key], query_gradients(*found, self.seed)
        of_layers = torch.cosine_similarity(expected, gradient, dim=1)
        return float(torch.cosine_similarity(expected.flatten(), gradient.flatten(), dim=0)), float(of_layers.min())


def query_gradients(
    maps_WNN: Tensor,
    keep_WNN: Tensor,
    seed: int,
    *,
    kind: AttentionLoss = "cosine",
    sink_mask: bool = True,
    cells: TokenCells | None = None,
) -> Tensor:
    """`[W, 64 * 64]` float64 gradient of a random student's query weights, a layer for each window.

    Maps may be of `cells`; the student is the same for them.
    """
    generator = torch.Generator().manual_seed(seed)
    num_tokens, width, heads = maps_WNN.shape[-1] if cells is None else int(cells.sizes_N.sum()), 64, 4
    future = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
    future = torch.nn.functional.pad(future, (TEXT_KEYS, 0))
    gradients = []
    for map_NN, keep_NN in zip(maps_WNN, keep_WNN, strict=True):
        inputs = torch.randn(TEXT_KEYS + num_tokens, width, generator=generator)
        weights = torch.randn(2, width, width, generator=generator) / width**0.5
        query_weights = weights[0].requires_grad_()
        queries = (inputs[TEXT_KEYS:] @ query_weights).unflatten(1, (heads, -1)).transpose(0, 1)
        keys = (inputs @ weights[1].detach()).unflatten(1, (heads, -1)).transpose(0, 1)
        scores = queries @ keys.transpose(1, 2) / (width / heads) ** 0.5
        student_NN = scores.masked_fill(future, -torch.inf).softmax(-1)[..., TEXT_KEYS:].mean(0)
        student_NN = student_NN if cells is None else cells.pooled(student_NN)
        loss = matched_loss(student_NN[None], map_NN[None], keep_NN[None], kind=kind, sink_mask=sink_mask)[0]
        (gradient,) = torch.autograd.grad(loss, query_weights)
        gradients.append(gradient.double().flatten())
    return torch.stack(gradients)


def _summary(cosines: Sequence[tuple[float, float]]) -> dict[str, float]:
    layers, worst = zip(*cosines, strict=True)
    return {"layers_median": statistics.median(layers), "layers_least": min(layers), "worst_layer": min(worst)}


def stored_bytes(config: MapCodecConfig, data: MapSet, coded: Sequence[EncodedMaps], pooling: int = 1) -> Counter[str]:
    """Array -> bytes a sample of a shard with all samples, metadata and checksums included."""
    logit_codec = LogitCodecConfig(vocab_size=2)
    manifest = Manifest(
        format_version=FORMAT_VERSION if pooling == 1 else POOLED_FORMAT_VERSION,
        fingerprint=Fingerprint(
            teacher_weights="", teacher_config={}, processor={}, chat_template="", tokenizer="",
            layers=data.layers, windows=data.windows, map_codec=config, logit_codec=logit_codec, dtype="float32",
            max_length=1, cut="tokens", images=ImageConfig(), image_backend="pil", samples="", capture_version=1,
            map_pooling=pooling,
        ),
        num_layers=max(data.layers) + 1, hidden_size=1, num_shards=1,
    )  # fmt: skip
    nothing, no_rows = (
        torch.zeros(0, dtype=torch.int32),
        AnswerLogitsCodec(logit_codec).encode(torch.zeros(0, 2), torch.zeros(0)),
    )
    samples = [SampleTargets(str(row), nothing, nothing.bool(), row, no_rows) for row in range(len(coded))]
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(folder)
        create_or_check(store, manifest)
        record = write_shard(store, 0, manifest, "samples-000000.tar", samples, list(coded), [])
    stored: Counter[str] = Counter()
    for path, (num_bytes, _) in sorted(record.files.items()):
        array = path.split("/")[0]
        if array.startswith(MAP_ARRAYS):
            stored[array] += num_bytes / len(coded)  # type: ignore[assignment]
    return stored


def _times(data: MapSet, rows: Sequence[Sequence[int]], repeats: int) -> dict[str, dict[str, list[float]]]:
    """CPU seconds of one thread to encode and to decode the first sample, by codec."""
    maps_LNN = data.maps[0]
    encode: dict[str, Callable[[], float]] = {}
    decode: dict[str, Callable[[], float]] = {}
    for name in CODECS:
        codec = MapCodec(MapCodecConfig(name=name), rows)
        encode[name] = partial(_cpu_seconds, partial(codec.encode, maps_LNN))
        decode[name] = partial(_cpu_seconds, partial(codec.decode_windows, codec.encode(maps_LNN)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {"encode": interleaved(encode, repeats), "decode": interleaved(decode, repeats)}
    finally:
        torch.set_num_threads(threads)


def _cpu_seconds(action: Callable[[], object]) -> float:
    started = time.thread_time()
    action()
    return time.thread_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-tokens", type=int, default=728)
    parser.add_argument("--samples", type=int, default=3, help="synthetic samples")
    parser.add_argument("--scenes", type=int, default=64, help="samples of the bundled teacher")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS / "attention_codes.json")
    flags = parser.parse_args()
    synthetic = synthetic_maps(flags.image_tokens, flags.samples)
    result = {
        "synthetic": measure(synthetic, flags.repeats),
        "scenes": measure(bundled_teacher_maps(flags.scenes), flags.repeats),
        "alternatives": measure_alternatives(synthetic, query_gradients),
    }
    save_result(flags.out, torch.device("cpu"), command_line("benchmarks.attention_codes"), result)
    print(flags.out.read_text())


if __name__ == "__main__":
    main()
