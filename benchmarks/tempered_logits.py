"""Noise of the logit loss's gradient at temperatures above 1, by what is stored of an answer row.

Rows are those of `answer_logits.py`, of several vocabularies. A student is off by normal errors of the logits of some
deviation: 1 for one that has begun to learn, 0.1 for one near its teacher. Noise is the root of the summed variances of
one row's gradient, over the norm of that gradient, by the formula of `AnswerLogitsCodec.encode`; nothing is sampled.
`from temperature 1` are the samples of earlier versions: drawn in proportion to the probability at temperature 1.

    python -m benchmarks.tempered_logits
"""

import argparse
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.answer_logits import KINDS, dense_gradient, make_rows
from benchmarks.results import RESULTS, command_line, save_result
from storage.codecs.codec_settings import DEFAULT_TOP_K, TEMPERED_TOP_K, LogitCodecConfig


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    vocabularies: tuple[int, ...] = (1_000, 32_000, 151_936)
    temperatures: tuple[float, ...] = (2.0, 4.0)
    deviations: tuple[float, ...] = (1.0, 0.1)
    rows: int = 4


@dataclass(frozen=True)
class Stored:
    """What is stored for one temperature."""

    top_k: int
    num_samples: int
    own_tail: bool
    """Whether samples are drawn as at the temperature."""


WAYS = {
    f"k = {DEFAULT_TOP_K}, 30 samples from temperature 1": Stored(DEFAULT_TOP_K, 30, own_tail=False),
    f"k = {DEFAULT_TOP_K}, 30 samples": Stored(DEFAULT_TOP_K, 30, own_tail=True),
    "k = 128, 128 samples": Stored(128, 128, own_tail=True),
    f"default: k = {TEMPERED_TOP_K}, 256 samples": Stored(TEMPERED_TOP_K, 256, own_tail=True),
    "k = 1024, 1024 samples": Stored(1024, 1024, own_tail=True),
}


def gradient_noise(teacher_RV: Tensor, temperature: float, stored: Stored) -> Tensor:
    """`[R]` root of the summed variances of the gradient of each row."""
    kept_RK = teacher_RV.topk(min(stored.top_k, teacher_RV.shape[1])).indices
    probs_RV = (teacher_RV / temperature).softmax(-1).scatter(1, kept_RK, 0)
    drawn_RV = probs_RV if stored.own_tail else teacher_RV.softmax(-1).scatter(1, kept_RK, 0)
    times_RV = stored.num_samples * drawn_RV / drawn_RV.sum(-1, keepdim=True).clamp(min=1e-300)
    weights_RV = torch.where(times_RV > 0, probs_RV / times_RV, 0)
    part_RV = times_RV % 1
    variance_R: Tensor = (weights_RV.square() * part_RV * (1 - part_RV)).sum(-1)
    return variance_R.sqrt() / temperature


def measure_rows(kind: str, vocab: int, sizes: Sizes) -> dict[str, dict[str, float]]:
    """Noise over gradient, mean over rows: temperature 1 as it is by default, then each temperature in each way."""
    teacher_RV = make_rows(kind, sizes.rows, vocab)
    generator = torch.Generator().manual_seed(2)
    errors_RV = torch.randn(teacher_RV.shape, generator=generator, dtype=torch.float64)
    settings: Mapping[str, tuple[float, Stored]] = {
        "temperature 1, default": (1.0, Stored(DEFAULT_TOP_K, 30, own_tail=True)),
        **{f"temperature {t:g}, {name}": (t, way) for t in sizes.temperatures for name, way in WAYS.items()},
    }
    found: dict[str, dict[str, float]] = {}
    for name, (temperature, stored) in settings.items():
        noise_R = gradient_noise(teacher_RV, temperature, stored)
        found[name] = {
            f"student off by {deviation:g}": statistics.mean(
                (
                    noise_R / dense_gradient(teacher_RV + deviation * errors_RV, teacher_RV, temperature).norm(dim=-1)
                ).tolist()
            )
            for deviation in sizes.deviations
        }
    return found


def row_bytes(vocab: int, temperatures: tuple[float, ...] = (2.0,)) -> dict[str, int]:
    """Bytes of an answer row without other temperatures, as earlier versions stored one of them, and of each way."""
    usual = LogitCodecConfig(vocab_size=vocab)
    found = {"temperature 1 alone": usual.row_bytes}
    for name, way in WAYS.items():
        codec = LogitCodecConfig(
            vocab_size=vocab, top_k=way.top_k, temperatures=temperatures, num_tempered_samples=way.num_samples
        )
        # Earlier versions had a tail's sum more, and the log-probability of each sample in 16 bits.
        found[name] = (
            codec.row_bytes if way.own_tail else usual.row_bytes + len(temperatures) * 4 + 2 * usual.num_sampled
        )
    return found


def measure(sizes: Sizes) -> dict[str, Any]:
    """By vocabulary: bytes of a row, and noise by kind of row."""
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
