"""Error of the logit loss's gradient at temperatures above 1, by what is stored of an answer row.

Rows are those of `answer_logits.py`, of several vocabularies. A student is off by normal errors of the logits of some
deviation: 1 for one that has begun to learn, 0.1 for one near its teacher. The error of one row's gradient is the root
of its expected square, over the norm of that gradient. Tail samples add noise, by the formula of
`AnswerLogitsCodec.encode`; codes of kept values add a shift that is the same in every draw. Nothing is sampled.

    python -m benchmarks.tempered_logits
"""

import argparse
import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.answer_logits import KINDS, dense_gradient, make_rows
from benchmarks.results import RESULTS, command_line, save_result
from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.codecs.codec_settings import TEMPERED_TOP_K, LogitCodecConfig, default_num_levels


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    vocabularies: tuple[int, ...] = (1_000, 32_000, 151_936)
    temperatures: tuple[float, ...] = (1.5, 2.0, 4.0)
    deviations: tuple[float, ...] = (1.0, 0.1)
    rows: int = 4


USUAL = "temperature 1 alone"
WHOLE = "whole vocabulary"
COUNTS = (TEMPERED_TOP_K, 1024, 4096)
"""Kept ids, and as many tail samples; the first is the default."""


def ways(vocab: int, temperature: float) -> dict[str, LogitCodecConfig]:
    """What may be stored for one temperature."""

    def codec(top_k: int, num_samples: int) -> LogitCodecConfig:
        return LogitCodecConfig(
            vocab_size=vocab,
            top_k=top_k,
            temperatures=(temperature,),
            num_tempered_samples=num_samples,
            num_levels=default_num_levels(vocab, top_k, (temperature,)),
        )

    return {name_of(count): codec(count, count) for count in COUNTS if count < vocab} | {WHOLE: codec(vocab, 1)}


def name_of(count: int) -> str:
    """Of a way with so many ids and samples."""
    return f"{count} ids and samples"


def gradient_error(teacher_RV: Tensor, temperature: float, codec: LogitCodecConfig) -> Tensor:
    """`[R]` root of the expected squared error of each row's gradient: noise of tail samples, and shift by codes."""
    noise_R = gradient_noise(teacher_RV, temperature, codec)
    addresses_R = torch.zeros(len(teacher_RV), dtype=torch.float64)
    stored = AnswerLogitsCodec(codec).decode(AnswerLogitsCodec(codec).encode(teacher_RV, addresses_R))
    exact_RK = (teacher_RV / temperature).softmax(-1).gather(1, stored.ids_RK)
    shift_R = (stored.probabilities(temperature)[0].double() - exact_RK).norm(dim=-1) / temperature
    return noise_R.hypot(shift_R)


def gradient_noise(teacher_RV: Tensor, temperature: float, codec: LogitCodecConfig) -> Tensor:
    """`[R]` root of the summed variances of the gradient of each row."""
    kept_RK = teacher_RV.topk(codec.num_kept).indices
    probs_RV = (teacher_RV / temperature).softmax(-1).scatter(1, kept_RK, 0)
    tail_R1 = probs_RV.sum(-1, keepdim=True)
    num_samples = max(codec.num_sampled if temperature == 1 else codec.num_tempered, 1)
    part_RV = num_samples * probs_RV / tail_R1.clamp(min=torch.finfo(torch.float64).tiny) % 1
    variance_R = (tail_R1[:, 0] / num_samples).square() * (part_RV * (1 - part_RV)).sum(-1)
    return variance_R.sqrt() / temperature


def measure_rows(kind: str, vocab: int, sizes: Sizes) -> dict[str, dict[str, float]]:
    """Error over gradient, mean over rows: temperature 1 as it is by default, then each temperature in each way."""
    teacher_RV = make_rows(kind, sizes.rows, vocab)
    generator = torch.Generator().manual_seed(2)
    errors_RV = torch.randn(teacher_RV.shape, generator=generator, dtype=torch.float64)
    settings = {USUAL: (1.0, LogitCodecConfig(vocab_size=vocab))} | {
        f"temperature {temperature:g}, {name}": (temperature, codec)
        for temperature in sizes.temperatures
        for name, codec in ways(vocab, temperature).items()
    }
    found: dict[str, dict[str, float]] = {}
    for name, (temperature, codec) in settings.items():
        error_R = gradient_error(teacher_RV, temperature, codec)
        found[name] = {}
        for deviation in sizes.deviations:
            exact_RV = dense_gradient(teacher_RV + deviation * errors_RV, teacher_RV, temperature)
            found[name][f"student off by {deviation:g}"] = statistics.mean((error_R / exact_RV.norm(dim=-1)).tolist())
    return found


def row_bytes(vocab: int) -> dict[str, int]:
    """Bytes of an answer row without other temperatures, and with one of them in each way."""
    return {USUAL: LogitCodecConfig(vocab_size=vocab).row_bytes} | {
        name: codec.row_bytes for name, codec in ways(vocab, 2.0).items()
    }


def measure(sizes: Sizes) -> dict[str, Any]:
    """By vocabulary: bytes of a row, and errors by kind of row."""
    return {
        str(vocab): {"row_bytes": row_bytes(vocab)} | {kind: measure_rows(kind, vocab, sizes) for kind in KINDS}
        for vocab in sizes.vocabularies
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    sizes = Sizes()
    result = {"sizes": asdict(sizes), "vocabularies": measure(sizes)}
    save_result(
        RESULTS / "tempered_logits.json", torch.device("cpu"), command_line("benchmarks.tempered_logits"), result
    )


if __name__ == "__main__":
    main()
