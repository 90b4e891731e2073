"""How far loss and gradient from coded maps are from those of uncoded ones: by bits, tokens, layers, student, scale.

Teachers are synthetic (`attention_maps.py`): one window of 1, 3 or 5 layers, with sinks, scores times 1, 2.5 or 5. A
student's map has the teacher's rows, with normal noise of some deviation added to the logarithm of each entry, or is
another sample's. Its loss and its gradient with respect to these logarithms are taken in float64, written out here.
Errors are relative: of the loss summed over the samples (`batch_loss`), of the root of the summed squares of their
gradients (`batch_gradient`), of one sample's loss and of one sample's gradient. `angle` is that between the pooled
vectors of coded and uncoded map, in radians.

With codes that turn the pooled vector by an angle e and a student whose loss is L = 1 - cos(theta), the gradient errs
by about e / sin(theta), so by e / sqrt(2 L) of its size: no bound holds for a student that equals its teacher.

    python -m benchmarks.map_bounds
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention_maps import synthetic_layers
from benchmarks.results import RESULTS, command_line, save_result
from storage.codecs.attention_maps import MapCodec
from storage.codecs.codec_settings import MapCodecConfig, MapCodecName

CODECS: tuple[MapCodecName, ...] = ("float16", "sqrt8", "sqrt4")
Measured = tuple[float, float, float, float, float]
LEAST_LOSS = 1e-12
"""Samples with less are left out: all their kept entries are in columns of one entry."""


@dataclass(frozen=True)
class Sizes:
    """Image tokens -> samples; deviations of students, None for another sample's map; how peaked the scores are; layers
    of the window.
    """

    samples: tuple[tuple[int, int], ...] = (
        (9, 64),
        (16, 64),
        (36, 64),
        (64, 64),
        (144, 64),
        (256, 32),
        (400, 32),
        (576, 32),
        (728, 24),
        (1152, 8),
        (1600, 6),
    )
    deviations: tuple[float | None, ...] = (None, 1.0, 0.3, 0.1)
    scales: tuple[float, ...] = (1.0, 2.5, 5.0)
    window_layers: tuple[int, ...] = (1, 3, 5)


def student_loss(
    logs_NN: Tensor, masses_NN: Tensor, teacher_NN: Tensor, keep_NN: Tensor
) -> tuple[float, Tensor, Tensor]:
    """Loss, its gradient with respect to `logs_NN`, and the teacher's pooled vector; all float64.

    The student's rows have the sums of those of `masses_NN`.
    """
    logs_NN = logs_NN.detach().clone().requires_grad_()
    student_NN = logs_NN.softmax(-1) * masses_NN.sum(-1, keepdim=True)
    seen_NN = student_NN.detach()
    kept_NN = (keep_NN & (seen_NN <= seen_NN.mean() + seen_NN.std())).double()
    counts_N = kept_NN.sum(0).clamp(min=1)
    own_N, wanted_N = (student_NN * kept_NN).sum(0) / counts_N, (teacher_NN * kept_NN).sum(0) / counts_N
    loss = 1 - own_N @ wanted_N / (own_N.norm() * wanted_N.norm()).clamp(min=1e-8)
    (gradient_NN,) = torch.autograd.grad(loss, logs_NN)
    return float(loss.detach()), gradient_NN, wanted_N


def measure_size(
    num_tokens: int,
    seeds: Sequence[int],
    scale: float,
    deviations: Sequence[float | None],
    window_layers: int,
) -> dict[float | None, dict[MapCodecName, dict[str, float]]]:
    """For each student every codec, on the same samples."""
    found: dict[float | None, dict[MapCodecName, list[Measured]]]
    found = {deviation: {name: [] for name in CODECS} for deviation in deviations}
    for seed in seeds:
        maps_LNN = synthetic_layers(num_tokens, window_layers, seed, scale)
        exact_NN = maps_LNN.double().mean(0)
        codecs = {name: MapCodec(MapCodecConfig(name=name), (tuple(range(window_layers)),)) for name in CODECS}
        decoded = {name: codec.decode_windows(codec.encode(maps_LNN)) for name, codec in codecs.items()}
        for deviation in deviations:
            logs_NN = student_logs(exact_NN, deviation, seed, scale)
            for name, ((coded_NN,), (keep_NN,)) in decoded.items():
                check_mask(exact_NN, keep_NN)
                exact = student_loss(logs_NN, exact_NN, exact_NN, keep_NN)
                coded = student_loss(logs_NN, exact_NN, coded_NN.double(), keep_NN)
                if exact[0] > LEAST_LOSS:
                    found[deviation][name].append(compared(exact, coded))
    return {deviation: {name: summary(each) for name, each in of.items()} for deviation, of in found.items()}


def student_logs(exact_NN: Tensor, deviation: float | None, seed: int, scale: float) -> Tensor:
    """Logarithms of a student's entries, before its rows get the teacher's masses."""
    num_tokens = len(exact_NN)
    if deviation is None:
        return synthetic_layers(num_tokens, 1, 20_000 + seed, scale)[0].double().log()
    generator = torch.Generator().manual_seed(10_000 + seed)
    noise_NN = torch.randn(num_tokens, num_tokens, generator=generator, dtype=torch.float64)
    return exact_NN.log() + deviation * noise_NN


def check_mask(exact_NN: Tensor, keep_NN: Tensor) -> None:
    """The stored mask is the definition's; a float32 rounding from the threshold an entry may lie on either side."""
    threshold = exact_NN.mean() + exact_NN.std()
    clear_NN = (exact_NN - threshold).abs() > 1e-6 * threshold
    assert torch.equal(keep_NN & clear_NN, (exact_NN <= threshold) & (exact_NN > 0) & clear_NN)


def compared(exact: tuple[float, Tensor, Tensor], coded: tuple[float, Tensor, Tensor]) -> Measured:
    """Loss, coded loss, error of the gradient, its norm, and angle, of two results of `student_loss`."""
    (loss, gradient_NN, pooled_N), (coded_loss, coded_gradient_NN, coded_N) = exact, coded
    chord = float((pooled_N / pooled_N.norm() - coded_N / coded_N.norm()).norm())
    error = float((coded_gradient_NN - gradient_NN).norm() / gradient_NN.norm())
    return loss, coded_loss, error, float(gradient_NN.norm()), 2 * math.asin(min(chord / 2, 1.0))


def summary(samples: Sequence[Measured]) -> dict[str, float]:
    """Of what `compared` says of each sample, to three digits."""
    loss, coded, gradient, size, angle = zip(*samples, strict=True)
    found = {
        "loss_median": statistics.median(loss),
        "batch_loss": abs(sum(coded) - sum(loss)) / sum(loss),
        "batch_gradient": math.hypot(*(a * b for a, b in zip(gradient, size, strict=True))) / math.hypot(*size),
        "sample_worst": max(abs(b - a) / a for a, b in zip(loss, coded, strict=True)),
        "gradient_median": statistics.median(gradient),
        "gradient_worst": max(gradient),
        "angle_worst": max(angle),
    }
    return {name: float(f"{value:.3g}") for name, value in found.items()}


def measure(sizes: Sizes) -> list[dict[str, Any]]:
    """One row for each window, number of tokens, student and scale."""
    rows = []
    for layers, (num_tokens, count), scale in product(sizes.window_layers, sizes.samples, sizes.scales):
        found = measure_size(num_tokens, range(count), scale, sizes.deviations, layers)
        head = {"window_layers": layers, "image_tokens": num_tokens, "samples": count, "scale": scale}
        rows += [{**head, "deviation": deviation, **of} for deviation, of in found.items()]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "map_bounds.json")
    parser.add_argument("--window-layers", type=int, nargs="+", default=Sizes.window_layers, help="layers of a window")
    flags = parser.parse_args()
    sizes = Sizes(window_layers=tuple(flags.window_layers))
    result = {"sizes": asdict(sizes), "rows": measure(sizes)}
    save_result(flags.out, torch.device("cpu"), command_line("benchmarks.map_bounds"), result)


if __name__ == "__main__":
    main()
