"""What the teacher predicts at an answer row, in a record of about 200 bytes: top-k, tail mass, tail draws.

Letters: R answer rows, V vocabulary, K kept tokens of a row, D draws from the tail (the V - K other tokens),
T temperatures (the first is 1), H values in float16, C coded values, B bytes of a record.

A record is what `LogitCodecConfig.sections` lists, one part after another: the K likeliest ids by falling
probability; their log-probabilities; for each temperature the log of what all other tokens add; the ids and
log-probabilities of D tokens drawn from these others. FORMAT.md says the same bit by bit.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from storage.codecs.bits import pack_bits, pack_integers, unpack_bits, unpack_integers
from storage.codecs.config import LogitCodecConfig

LOWEST_LOGPROB = -50.0
"""The `levels` codec stores rarer tokens as this rare: 2e-22 each, 4e-6 at temperature 4."""

MAX_MASS_ERROR = 0.25
"""By rounding alone, decoded kept and tail mass sum to 1 within less than this, however coarse the levels."""

_ROWS_AT_ONCE = 32
"""Bounds the float64 copies: 32 rows of 151,936 words are 39 MB each."""


@dataclass(frozen=True)
class AnswerLogits:
    """Decoded records. With l the log-probability of a token at temperature 1:"""

    codec: LogitCodecConfig
    ids_RK: Tensor
    """int64, by falling l, equal ones by rising id."""
    logprobs_RK: Tensor
    """float32, l."""
    tails_RT: Tensor
    """float32, log of the sum of exp(l / T) over the tokens that are not kept, at T = 1 and each of
    `codec.temperatures`; at T = 1 the log of their probability. -inf when there is none."""
    draw_ids_RD: Tensor
    """int64, drawn from the tokens that are not kept, each with probability proportional to exp(l)."""
    draw_logprobs_RD: Tensor
    """float32, their l; `[R, 0]` if no temperature besides 1 is stored."""

    def __len__(self) -> int:
        return len(self.ids_RK)

    def probabilities(self, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher's distribution at a temperature: exact on the kept ids, in expectation on all others.

        Returns:
            p_T of the kept ids `[R, K]`; the mass of all other tokens `[R]`; weights of the drawn ids `[R, D]`.
            A token's drawn weights add up to its p_T in expectation: a draw weighs p_T / (D r), where r is the
            probability it was drawn with. Kept and tail masses sum to 1.

        Raises:
            ValueError: For a temperature that was not stored.
        """
        kept_RK = self.logprobs_RK / temperature
        num_draws = self.draw_ids_RD.shape[1]
        if not num_draws:
            nothing_R = kept_RK.new_zeros(len(kept_RK))
            return kept_RK.softmax(-1), nothing_R, nothing_R[:, None].expand(-1, 0)
        stored = (1.0, *self.codec.temperatures)
        if temperature not in stored:
            raise ValueError(f"temperature {temperature} was not stored, only {list(stored)}")
        tail_R = self.tails_RT[:, stored.index(temperature)]
        # The stored sums normalise: rounded log-probabilities alone would not leave a tail of 1e-6 right.
        log_partition_R = torch.logaddexp(kept_RK.logsumexp(-1), tail_R)
        probs_RK, mass_R = (kept_RK - log_partition_R[:, None]).exp(), (tail_R - log_partition_R).exp()
        if temperature == 1:
            return probs_RK, mass_R, (mass_R / num_draws)[:, None].expand(-1, num_draws)
        # p_T / (D r) with p_T = exp(l / T) / Z and r = exp(l) / tail.
        log_ratio_RD = self.tails_RT[:, :1] + self.draw_logprobs_RD * (1 / temperature - 1) - log_partition_R[:, None]
        weights_RD = log_ratio_RD.exp() / num_draws
        return probs_RK, mass_R, weights_RD.masked_fill((mass_R == 0)[:, None], 0.0)


def row_addresses(key: str, num_rows: int) -> Tensor:
    """`[R]` float64 in [0, 1): where the tail of each answer row of a sample is drawn.

    They follow from the sample's key and the row's number alone, so that batches, workers and restarts draw the same.
    """
    digests = [hashlib.sha256(f"{key}:{row}".encode()).digest() for row in range(num_rows)]
    numbers = [int.from_bytes(digest[:8], "little") >> 11 for digest in digests]
    return torch.tensor(numbers, dtype=torch.float64) * 2.0**-53


def encode_logits(codec: LogitCodecConfig, logits_RV: Tensor, addresses_R: Tensor) -> Tensor:
    """Code answer rows.

    *Draws.* With the other tokens in order of their ids, r(i) = p(i) / tail mass, F the running sum of r and u the
    row's address, the draws are the tokens where F passes (u + 0) / D, (u + 1) / D, ... ("systematic sampling").
    For u uniform in [0, 1) the expected number of draws of token i is D r(i), so the estimate of p that gives each
    draw the weight tail / D is *unbiased* for every token, and so is the gradient of the cross entropy, q - p, for
    any student q. Its *variance*, summed over tokens, is (tail / D)**2 * sum f (1 - f) with f the fractional part
    of D r(i): at most tail**2 / D, and the least that D draws of equal weight can have, since the number of draws
    of each token is one of the two integers next to D r(i). Proportional to p is also the best proposal at
    temperature 1: sum p**2 / r is least there. At other temperatures draws weigh p_T / (D r): unbiased too, but with
    much more variance above 1, where rare tokens count more than they are drawn (`benchmarks/answer_logits.py`).

    *Error of `levels`.* The first `num_exact` log-probabilities and the lowest are float16 (2**-11 relative). One
    between them, at depth x = (top - l) / (top - lowest), has level round((num_levels - 1) * sqrt(x)): steps are
    small where probability is. It is off by at most range * (sqrt(x) / (num_levels - 1) + 1 / (4 (num_levels -
    1)**2)), range = top - lowest. KL over the kept tokens and the tail stays below 3e-5 on all rows of
    `benchmarks/answer_logits.py`. Tails are float32, and not one minus the stored values, which would be noise where
    the tail is smaller than their rounding.

    Args:
        codec: The codec.
        logits_RV: `[R, V]` floating point; -inf forbids a token. Any device. Sums are taken in float64.
        addresses_R: `[R]` float64 in [0, 1), see `row_addresses`.

    Returns:
        `[R, B]` uint8 records on the same device.

    Raises:
        ValueError: For NaN or +inf logits, for rows without a finite logit, and for another V than the codec's.
    """
    if logits_RV.ndim != 2 or not logits_RV.is_floating_point() or logits_RV.shape[1] != codec.vocab_size:
        found = f"{logits_RV.dtype} {tuple(logits_RV.shape)}"
        raise ValueError(f"logits are {found}, expected floats [R, {codec.vocab_size}]")
    if addresses_R.shape != logits_RV.shape[:1] or not bool(((addresses_R >= 0) & (addresses_R < 1)).all()):
        raise ValueError(f"addresses are {tuple(addresses_R.shape)}, expected one in [0, 1) for each row")
    addresses_R = addresses_R.to(logits_RV.device, torch.float64)
    blocks = zip(torch.split(logits_RV.detach(), _ROWS_AT_ONCE), torch.split(addresses_R, _ROWS_AT_ONCE), strict=True)
    records = [_encode_rows(codec, rows_RV, rows_R) for rows_RV, rows_R in blocks if len(rows_R)]
    return torch.cat([torch.zeros((0, codec.row_bytes), dtype=torch.uint8, device=logits_RV.device), *records])


def decode_logits(codec: LogitCodecConfig, records_RB: Tensor) -> AnswerLogits:
    """Decode records, within the bounds stated at `encode_logits`.

    Args:
        codec: The codec they were made with.
        records_RB: `[R, B]` uint8, any device.

    Returns:
        Tensors on the same device.

    Raises:
        ValueError: If type or size are not the codec's.
    """
    if records_RB.dtype != torch.uint8 or records_RB.ndim != 2 or records_RB.shape[1] != codec.row_bytes:
        found = f"{records_RB.dtype} {tuple(records_RB.shape)}"
        raise ValueError(f"records are {found}, expected torch.uint8 [R, {codec.row_bytes}]")
    parts = dict(zip(codec.sections, torch.split(records_RB, list(codec.sections.values()), dim=1), strict=True))
    values_RH = _floats(parts["values"], torch.float16)
    logprobs_RK = values_RH
    if codec.num_coded:
        coded_RC = _from_levels(codec, parts["levels"], values_RH[:, -2], values_RH[:, -1])
        logprobs_RK = torch.cat([values_RH[:, :-1], coded_RC, values_RH[:, -1:]], dim=1)
    return AnswerLogits(
        codec=codec,
        ids_RK=unpack_integers(parts["ids"], codec.num_kept, codec.id_bits),
        logprobs_RK=logprobs_RK,
        tails_RT=_floats(parts["tails"], torch.float32),
        draw_ids_RD=unpack_integers(parts["draw_ids"], codec.num_stored_draws, codec.id_bits),
        draw_logprobs_RD=_floats(parts["draw_values"], torch.float16),
    )


def faults_of(logits: AnswerLogits) -> str | None:
    """What no teacher says: ids past the vocabulary, NaN, or probabilities far from 1 in sum; None for sound rows."""
    ids = torch.cat([logits.ids_RK, logits.draw_ids_RD], dim=1)
    if bool((ids >= logits.codec.vocab_size).any()):
        return f"token id {int(ids.max())}, past the vocabulary of {logits.codec.vocab_size}"
    floats = torch.cat([logits.logprobs_RK, logits.tails_RT, logits.draw_logprobs_RD], dim=1)
    if bool(floats.isnan().any()) or bool((floats == torch.inf).any()):
        return "NaN or infinite values"
    total_R = torch.logaddexp(logits.logprobs_RK.logsumexp(-1), logits.tails_RT[:, 0]).exp()
    if bool(((total_R - 1).abs() > MAX_MASS_ERROR).any()):
        worst = float(total_R[(total_R - 1).abs().argmax()])
        return f"probabilities that sum to {worst:.4f}"
    return None


def _encode_rows(codec: LogitCodecConfig, logits_RV: Tensor, addresses_R: Tensor) -> Tensor:
    exact_RV = logits_RV.double()
    log_partition_R1 = exact_RV.logsumexp(-1, keepdim=True)
    if not bool(torch.isfinite(log_partition_R1).all()):
        raise ValueError("a row of logits holds NaN or +inf, or no finite value; the teacher's run is broken")
    logprobs_RV = exact_RV - log_partition_R1
    ids_RK = _top_ids(logits_RV, codec.num_kept)
    kept_RK = logprobs_RV.gather(1, ids_RK)
    others_RV = logprobs_RV.scatter_(1, ids_RK, -torch.inf)
    running_RV = others_RV.exp().cumsum(-1)
    draws_RD = _draw(running_RV, addresses_R, codec.num_stored_draws)
    sums = [running_RV[:, -1], *((others_RV / t).exp_().sum(-1) for t in codec.temperatures)]
    parts = [
        pack_integers(ids_RK, codec.id_bits),
        *_code_values(codec, kept_RK),
        torch.stack(sums, dim=1).log().float().view(torch.uint8),
        pack_integers(draws_RD, codec.id_bits),
        others_RV.gather(1, draws_RD[:, : codec.num_draw_values]).half().view(torch.uint8),
    ]
    return torch.cat(parts, dim=1)


def _code_values(codec: LogitCodecConfig, kept_RK: Tensor) -> list[Tensor]:
    """Float16 values and packed levels; of the latter, from level 0 up, a 1 for each value on a level, a 0 for each
    step to the next level.
    """
    if codec.name == "levels":
        kept_RK = kept_RK.clamp(min=LOWEST_LOGPROB)
    values_RH = torch.cat([kept_RK[:, : codec.num_values - 1], kept_RK[:, -1:]], dim=1).half()
    if not codec.num_coded:
        return [values_RH.view(torch.uint8)]
    top_R1, lowest_R1 = values_RH[:, -2:-1].double(), values_RH[:, -1:].double()
    range_R1 = (top_R1 - lowest_R1).clamp(min=torch.finfo(torch.float16).tiny)
    depth_RC = ((top_R1 - kept_RK[:, codec.num_values - 1 : -1]) / range_R1).clamp(0, 1)
    levels_RC = (depth_RC.sqrt() * (codec.num_levels - 1)).round().long()
    positions_RC = levels_RC + torch.arange(codec.num_coded, device=kept_RK.device)
    bits_RQ = torch.zeros((len(kept_RK), codec.num_level_bits), dtype=torch.bool, device=kept_RK.device)
    return [values_RH.view(torch.uint8), pack_bits(bits_RQ.scatter_(1, positions_RC, True))]


def _from_levels(codec: LogitCodecConfig, packed_RB: Tensor, top_R: Tensor, lowest_R: Tensor) -> Tensor:
    bits_RQ = unpack_bits(packed_RB, codec.num_level_bits)
    # Positions of the ones: a stable sort puts them first, in order, and needs no copy to the host.
    positions_RC = bits_RQ.byte().sort(dim=1, descending=True, stable=True).indices[:, : codec.num_coded]
    levels_RC = positions_RC - torch.arange(codec.num_coded, device=packed_RB.device)
    return top_R[:, None] - (top_R - lowest_R)[:, None] * (levels_RC.float() / (codec.num_levels - 1)).square()


def _draw(running_RV: Tensor, addresses_R: Tensor, num_draws: int) -> Tensor:
    """`[R, D]` int64 ids at evenly spaced places of the running sum; token 0 where there is no mass."""
    total_R1 = running_RV[:, -1:].contiguous()
    steps_D = torch.arange(num_draws, dtype=torch.float64, device=running_RV.device)
    places_RD = (addresses_R[:, None] + steps_D) / max(num_draws, 1) * total_R1
    # Rounding may push the last place onto the sum itself, past the last token.
    places_RD = torch.minimum(places_RD, total_R1.nextafter(torch.zeros_like(total_R1)))
    # The first token whose sum is above the place: its own mass is above 0, so it is no kept one.
    draws_RD = torch.searchsorted(running_RV, places_RD, right=True)
    return draws_RD.masked_fill(total_R1 == 0, 0)


def _floats(bytes_RB: Tensor, dtype: torch.dtype) -> Tensor:
    """`[R, n]` float32 of little-endian numbers."""
    # A copy: a part of a record may begin at an odd byte.
    flat = bytes_RB.clone(memory_format=torch.contiguous_format).flatten().view(dtype)
    return flat.view(len(bytes_RB), bytes_RB.shape[1] // dtype.itemsize).float()


def _top_ids(logits_RV: Tensor, num_kept: int) -> Tensor:
    """`[R, K]` int64: `torch.topk` leaves open which of equal logits it takes, and in which order."""
    smallest_R1 = logits_RV.topk(num_kept, dim=-1).values[:, -1:]
    above_RV, equal_RV = logits_RV > smallest_R1, logits_RV == smallest_R1
    num_wanted_R1 = num_kept - above_RV.sum(-1, keepdim=True)
    taken_RV = above_RV | (equal_RV & (equal_RV.cumsum(-1, dtype=torch.int32) <= num_wanted_R1))
    rising_ids_RK = taken_RV.nonzero()[:, 1].view(len(logits_RV), num_kept)
    order_RK = logits_RV.gather(1, rising_ids_RK).sort(dim=-1, descending=True, stable=True).indices
    return rising_ids_RK.gather(1, order_RK)
