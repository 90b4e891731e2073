"""Bytes, coding error and gradient error of stored answer rows, against the alternatives that were weighed.

Rows are made, not taken from a model: 151,936 words in random order, with log-probabilities of these shapes before the
softmax (r is a word's rank from 1, noise is normal with deviation 0.5):

    peaked   -1.6 ln r + noise, the likeliest raised to between e^2 and e^9 times all others together
    medium   -1.5 ln r + noise
    flat     -ln (r + 2) + noise
    options  12 words with noise of deviation 1, all others -1.5 ln r - 3 + noise: a choice with letters
    normal   normal with deviation 3, as of a hidden state against random embeddings

Students are the teacher's logits plus normal noise of deviation 1. Torch alone, on the CPU.

    python -m benchmarks.answer_logits
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import RESULTS, command_line, save_result
from stages.student.losses.logits import teacher_rows
from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.codecs.codec_settings import LogitCodecConfig
from storage.codecs.tail_samples import row_addresses

KINDS = ("peaked", "medium", "flat", "options", "normal")
BUDGET_BYTES = 220

PEERS = {
    "DistillKit as shipped, k = 128, V = 32k": {"row_bytes": 296, "coding_error": [1e-2, 1e-2]},
    "DistillKit at its best (normalize_t), k = 128, V = 32k": {"row_bytes": 296, "coding_error": [6e-5, 4e-4]},
    "Megatron-LM offline distillation": {"row_bytes": 528, "coding_error": None},
    "plain record, k = 64, V = 32k: 8 values in float16, the rest in 6 bits": {
        "row_bytes": 182,
        "coding_error": [5e-6, 2.5e-5],
    },
}
"""Measured or read before, on rows of their own; not run by this script."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    vocab: int = 151_936
    rows: int = 32
    gradient_rows: int = 2
    addresses: int = 200
    """Independent ones of each of those rows, from which bias and noise of the gradient are estimated."""
    timed_rows: int = 128
    repeats: int = 5


def make_rows(kind: str, num_rows: int, vocab: int, seed: int = 0) -> Tensor:
    """`[R, V]` float64 logits of one of `KINDS`."""
    generator = torch.Generator().manual_seed(seed)
    rank_V = torch.arange(1, vocab + 1, dtype=torch.float64)
    noise_RV = torch.randn(num_rows, vocab, generator=generator, dtype=torch.float64) / 2
    if kind == "peaked":
        logits_RV = -1.6 * rank_V.log() + noise_RV
        logits_RV[:, 0] = logits_RV[:, 1:].logsumexp(-1) + torch.linspace(2, 9, num_rows).double()
    elif kind == "medium":
        logits_RV = -1.5 * rank_V.log() + noise_RV
    elif kind == "flat":
        logits_RV = -(rank_V + 2).log() + noise_RV
    elif kind == "options":
        logits_RV = -1.5 * rank_V.log() - 3 + noise_RV
        logits_RV[:, :12] = 2 * noise_RV[:, :12]
    else:
        logits_RV = 6 * noise_RV
    order_RV = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(num_rows)])
    return torch.zeros_like(logits_RV).scatter_(1, order_RV, logits_RV)


# Coding error


def coding_error(exact_RK: Tensor, decoded_RK: Tensor, tail_R: Tensor) -> Tensor:
    """`[R]` KL of the decoded from the exact distribution over the kept tokens and one event for all others."""
    log_total_R = torch.logaddexp(decoded_RK.logsumexp(-1), tail_R)
    kept_R = (exact_RK.exp() * (exact_RK - decoded_RK + log_total_R[:, None])).sum(-1)
    return kept_R + tail_R.exp() * log_total_R


def plain_bits(bits: int) -> Callable[[Tensor], Tensor]:
    """8 values in float16, the rest evenly spaced in so many bits each."""
    return spaced_levels(2**bits, power=1)


def spaced_levels(num_levels: int, power: float) -> Callable[[Tensor], Tensor]:
    """8 values and the lowest in float16, between them levels whose spacing grows with depth ** (power - 1)."""

    def decoded(exact_RK: Tensor) -> Tensor:
        ends = exact_RK[:, :8].half().double()
        top_R1, lowest_R1 = ends[:, -1:], exact_RK[:, -1:].half().double()
        depth_RC = ((top_R1 - exact_RK[:, 8:-1]) / (top_R1 - lowest_R1)).clamp(0, 1)
        level_RC = (depth_RC ** (1 / power) * (num_levels - 1)).round() / (num_levels - 1)
        return torch.cat([ends, top_R1 - (top_R1 - lowest_R1) * level_RC**power, lowest_R1], dim=1)

    return decoded


def level_bytes(num_coded: int, num_levels: int) -> int:
    """Bytes of that many values on rising levels: a bit each, and one a step."""
    return -(-(num_coded + num_levels - 1) // 8)


def measure_coding(sizes: Sizes, k: int = 64) -> dict[str, Any]:
    """Bytes of the values and KL, median and worst of all rows, of each way to code them; ids and tails are exact."""
    num_coded = k - 9
    ways: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
        "float16": (2 * k, lambda exact: exact.half().double()),
        "8 exact, 6 bits each": (18 + -(-6 * num_coded // 8), plain_bits(6)),
        "8 exact, 7 bits each": (18 + -(-7 * num_coded // 8), plain_bits(7)),
    }
    for num_levels in (64, 128, 256):
        for power in (1, 2, 3):
            size = 18 + level_bytes(num_coded, num_levels)
            ways[f"8 exact, {num_levels} levels, power {power}"] = (size, spaced_levels(num_levels, power))
    errors: dict[str, dict[str, list[float]]] = {name: {} for name in ways}
    for kind in KINDS:
        logprobs_RV = make_rows(kind, sizes.rows, sizes.vocab).log_softmax(-1)
        exact_RK, ids_RK = logprobs_RV.topk(k, dim=-1)
        tail_R = logprobs_RV.scatter(1, ids_RK, -torch.inf).logsumexp(-1)
        for name, (_, decoded) in ways.items():
            error_R = coding_error(exact_RK, decoded(exact_RK), tail_R)
            errors[name][kind] = [float(error_R.median()), float(error_R.max())]
    return {name: {"value_bytes": size, "median_and_worst": errors[name]} for name, (size, _) in ways.items()}


def measure_codec(sizes: Sizes, codec: LogitCodecConfig) -> dict[str, Any]:
    """The same of the codec as it is stored."""
    found = {}
    for kind in KINDS:
        logits_RV = make_rows(kind, sizes.rows, sizes.vocab)
        logprobs_RV = logits_RV.log_softmax(-1)
        decoded = AnswerLogitsCodec(codec).decode(
            AnswerLogitsCodec(codec).encode(logits_RV, row_addresses(kind, sizes.rows))
        )
        exact_RK = logprobs_RV.gather(1, decoded.ids_RK)
        tail_R = logprobs_RV.scatter(1, decoded.ids_RK, -torch.inf).logsumexp(-1)
        error_R = coding_error(exact_RK, decoded.logprobs_RK.double(), tail_R)
        found[kind] = [float(error_R.median()), float(error_R.max())]
    sections = codec.sections
    return {"codec": codec.model_dump(), "sections": sections, "row_bytes": codec.row_bytes, "median_and_worst": found}


# Gradient error


def dense_gradient(student_RV: Tensor, teacher_RV: Tensor, temperature: float = 1.0) -> Tensor:
    """Of the full cross entropy with respect to the student's logits: (q - p) / T."""
    return ((student_RV / temperature).softmax(-1) - (teacher_RV / temperature).softmax(-1)) / temperature


def truncated_gradient(student_RV: Tensor, teacher_RV: Tensor, k: int) -> Tensor:
    """Of the cross entropy under the k likeliest alone, renormalised."""
    kept_RK, ids_RK = teacher_RV.topk(k, dim=-1)
    return student_RV.softmax(-1).scatter_add(1, ids_RK, -kept_RK.softmax(-1))


def bucket_gradient(student_RV: Tensor, teacher_RV: Tensor, k: int) -> Tensor:
    """Of the cross entropy over the k likeliest and one event for all others."""
    student_RV = student_RV.clone().requires_grad_()
    p_RV, log_q_RV = teacher_RV.softmax(-1), student_RV.log_softmax(-1)
    ids_RK = teacher_RV.topk(k, dim=-1).indices
    kept_R = (p_RV.gather(1, ids_RK) * log_q_RV.gather(1, ids_RK)).sum(-1)
    p_tail_R, log_q_tail_R = p_RV.scatter(1, ids_RK, 0).sum(-1), log_q_RV.scatter(1, ids_RK, -torch.inf).logsumexp(-1)
    (gradient_RV,) = torch.autograd.grad(-(kept_R + p_tail_R * log_q_tail_R).sum(), student_RV)
    return gradient_RV


def drawn_gradients(
    student_V: Tensor, teacher_V: Tensor, codec: LogitCodecConfig, sizes: Sizes, temperature: float
) -> Tensor:
    """`[n, V]` float32: the gradient of the stored loss of one row at independent addresses."""
    generator = torch.Generator().manual_seed(1)
    parts = []
    for count in [50] * (sizes.addresses // 50):
        addresses_R = torch.rand(count, generator=generator, dtype=torch.float64)
        stored = AnswerLogitsCodec(codec).decode(
            AnswerLogitsCodec(codec).encode(teacher_V.expand(count, -1), addresses_R)
        )
        student_RV = student_V.float().expand(count, -1).contiguous().requires_grad_()
        loss = teacher_rows(stored, student_RV.shape[1], temperature).loss(student_RV, "forward").sum()
        parts.append(torch.autograd.grad(loss, student_RV)[0])
    return torch.cat(parts)


def draw_errors(
    student_RV: Tensor, teacher_RV: Tensor, codec: LogitCodecConfig, sizes: Sizes, temperature: float = 1.0
) -> dict[str, float]:
    """Bias and noise of the stored loss's gradient, in norms of the dense gradient, mean over rows.

    Noise is the root of the summed variances. `bias_of_coding` is what the codes of kept values (and of drawn ones, at
    a temperature) shift the gradient by, whatever is drawn; it is worked out, not sampled. `bias_of_draws` is the norm
    of what the mean gradient is off beyond that, less the part that noise alone leaves, which is `noise_of_the_mean`:
    a bias below that is not distinguished from none.
    """
    coding, biases, noises = [], [], []
    for student_V, teacher_V in zip(student_RV, teacher_RV, strict=True):
        dense_V = dense_gradient(student_V[None], teacher_V[None], temperature)[0]
        shift_V = coding_shift(teacher_V, codec, temperature)
        gradients_nV = drawn_gradients(student_V, teacher_V, codec, sizes, temperature).double()
        variance = float(gradients_nV.var(0).sum())
        square = float((gradients_nV.mean(0) - dense_V - shift_V).square().sum()) - variance / len(gradients_nV)
        norm = float(dense_V.norm())
        coding.append(float(shift_V.norm()) / norm)
        biases.append(max(square, 0.0) ** 0.5 / norm)
        noises.append(variance**0.5 / norm)
    noise = statistics.mean(noises)
    return {
        "bias_of_coding": statistics.mean(coding),
        "bias_of_draws": statistics.mean(biases),
        "noise": noise,
        "noise_of_the_mean": noise / sizes.addresses**0.5,
    }


def coding_shift(teacher_V: Tensor, codec: LogitCodecConfig, temperature: float) -> Tensor:
    """`[V]` the stored loss's gradient, in the mean over all draws, less the dense one."""
    record_RB = AnswerLogitsCodec(codec).encode(teacher_V[None], torch.zeros(1, dtype=torch.float64))
    stored = AnswerLogitsCodec(codec).decode(record_RB)
    kept_RK, tail_R, _ = stored.probabilities(temperature)
    at_temperature = [1.0, *codec.temperatures].index(temperature)
    log_partition = float(stored.tails_RX[0, at_temperature]) - math.log(float(tail_R))
    exact_V = teacher_V.log_softmax(-1)
    # Drawn with probability exp(l - tail of 1), weighed by what the stored l makes of it.
    mean_V = (exact_V + exact_V.half().double() * (1 / temperature - 1) - log_partition).exp()
    mean_V[stored.ids_RK[0]] = kept_RK[0].double()
    return ((teacher_V / temperature).softmax(-1) - mean_V) / temperature


def measure_gradients(sizes: Sizes, k: int = 64) -> dict[str, Any]:
    """By kind: no draws (top-k alone, top-k and one event for the rest), then 1, 2, 4, 8 draws, then the default.

    Draws are noisy where one event is biased; `rows_from_which_default_is_closer` is the number of independent rows
    over which the default's noise averages out to the one event's bias.
    """
    found: dict[str, Any] = {}
    for kind in KINDS:
        teacher_RV = make_rows(kind, sizes.gradient_rows, sizes.vocab)
        generator = torch.Generator().manual_seed(2)
        student_RV = teacher_RV + torch.randn(teacher_RV.shape, generator=generator, dtype=torch.float64)
        dense_RV = dense_gradient(student_RV, teacher_RV)
        norm_R = dense_RV.norm(dim=-1)
        found[kind] = {
            name: {"bias": float(((gradient_RV - dense_RV).norm(dim=-1) / norm_R).mean()), "noise": 0.0}
            for name, gradient_RV in {
                "0 draws, top-k alone": truncated_gradient(student_RV, teacher_RV, k),
                "0 draws, tail as one event": bucket_gradient(student_RV, teacher_RV, k),
            }.items()
        }
        for num_draws in (1, 2, 4, 8):
            codec = LogitCodecConfig(vocab_size=sizes.vocab, top_k=k, num_tail_samples=num_draws)
            found[kind][f"{num_draws} draws"] = draw_errors(student_RV, teacher_RV, codec, sizes)
        default = LogitCodecConfig(vocab_size=sizes.vocab)
        name = f"default: k = {default.num_kept}, {default.num_sampled} draws"
        found[kind][name] = draw_errors(student_RV, teacher_RV, default, sizes)
        bias = found[kind]["0 draws, tail as one event"]["bias"]
        found[kind]["rows_from_which_default_is_closer"] = math.ceil((found[kind][name]["noise"] / bias) ** 2)
        warm = LogitCodecConfig(vocab_size=sizes.vocab, temperatures=(2.0,))
        found[kind][f"{name}, temperature 2"] = draw_errors(student_RV, teacher_RV, warm, sizes, 2.0)
    return found


def measure_division(sizes: Sizes) -> dict[str, Any]:
    """How to divide the budget: for each k the draws that fit, and the noise by the docstring's formula.

    Noise is in norms of the teacher's distribution, median over rows.
    """
    found: dict[str, Any] = {}
    for k in (16, 24, 32, 40, 48, 56, 64, 72):
        codecs = [LogitCodecConfig(vocab_size=sizes.vocab, top_k=k, num_tail_samples=count) for count in range(1, 200)]
        fitting = [codec for codec in codecs if codec.row_bytes <= BUDGET_BYTES]
        if not fitting or not fitting[-1].num_sampled:
            continue
        codec, noise = fitting[-1], {}
        for kind in KINDS:
            probs_RV = make_rows(kind, sizes.rows, sizes.vocab).softmax(-1).sort(dim=-1, descending=True).values
            tail_R1 = probs_RV[:, k:].sum(-1, keepdim=True)
            rest_RV = (codec.num_tail_samples * probs_RV[:, k:] / tail_R1) % 1
            variance_R = (tail_R1[:, 0] / codec.num_tail_samples) ** 2 * (rest_RV * (1 - rest_RV)).sum(-1)
            noise[kind] = float((variance_R.sqrt() / probs_RV.norm(dim=-1)).median())
        found[f"k = {k}"] = {"draws": codec.num_tail_samples, "row_bytes": codec.row_bytes, "noise": noise}
    return found


def measure_time(sizes: Sizes, codec: LogitCodecConfig) -> dict[str, float]:
    """Milliseconds a row, medians; the vocabulary's projection is not in it."""
    logits_RV = make_rows("medium", sizes.timed_rows, sizes.vocab).float()
    addresses_R = row_addresses("time", sizes.timed_rows)
    encode, decode = [], []
    for _ in range(sizes.repeats):
        started = time.perf_counter()
        records_RQ = AnswerLogitsCodec(codec).encode(logits_RV, addresses_R)
        middle = time.perf_counter()
        AnswerLogitsCodec(codec).decode(records_RQ)
        encode.append(middle - started)
        decode.append(time.perf_counter() - middle)
    to_ms = 1000 / sizes.timed_rows
    return {"encode_ms_a_row": statistics.median(encode) * to_ms, "decode_ms_a_row": statistics.median(decode) * to_ms}


def measure(sizes: Sizes) -> dict[str, Any]:
    """All of it."""
    default = LogitCodecConfig(vocab_size=sizes.vocab)
    k64 = LogitCodecConfig(vocab_size=sizes.vocab, top_k=64, num_tail_samples=4, temperatures=(2.0,))
    return {
        "sizes": asdict(sizes),
        "default": measure_codec(sizes, default),
        "k = 64, 4 draws, temperatures 1 and 2": measure_codec(sizes, k64),
        "peers": PEERS,
        "values_at_k_64": measure_coding(sizes),
        "gradient_in_norms_of_the_dense_one_at_k_64": measure_gradients(sizes),
        f"division_of_{BUDGET_BYTES}_bytes": measure_division(sizes),
        "time": measure_time(sizes, default),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    result = measure(Sizes())
    save_result(RESULTS / "answer_logits.json", torch.device("cpu"), command_line("benchmarks.answer_logits"), result)


if __name__ == "__main__":
    main()
