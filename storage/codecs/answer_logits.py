"""The codec of answer rows: a row's top-k, tail mass and tail samples in a record of about 200 bytes.

A record is what `LogitCodecConfig.sections` lists, one part after another: the K likeliest ids by falling
probability; their log-probabilities; for each temperature the log of what all other tokens add; for each temperature
the ids of tokens sampled from these others. FORMAT.md says the same bit by bit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from storage.codecs.bits import pack_integers, unpack_integers, unpack_narrow
from storage.codecs.codec_settings import LogitCodecConfig
from storage.codecs.levels import decode_kept, encode_kept, floats_from_bytes
from storage.codecs.tail_samples import sample_tail

MAX_MASS_ERROR = 0.25
"""By rounding alone, decoded kept and tail mass sum to 1 within less than this, however coarse the levels."""

_ROWS_AT_ONCE = 32
"""Bounds the float64 copies: 32 rows of 151,936 words are 39 MB each."""


@dataclass(frozen=True)
class AnswerLogits:
    """Decoded records. l is the log-probability of a token at temperature 1."""

    codec: LogitCodecConfig
    ids_RK: Tensor
    """int64, by falling l, equal ones by rising id."""
    logprobs_RK: Tensor
    """float32, l."""
    tails_RX: Tensor
    """float32, log of the sum of exp(l / T) over the tokens that are not kept (-inf without any), at T = 1, where it is
    the log of their probability, and at each of `codec.temperatures`."""
    tail_ids: tuple[Tensor, ...]
    """int64 `[R, D]` each, for T = 1 and each of `codec.temperatures`: sampled from the tokens that are not kept, in
    proportion to exp(l / T)."""

    def __len__(self) -> int:
        return len(self.ids_RK)

    def probabilities(self, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher's distribution at a temperature: exact on the kept ids, in expectation on all others.

        Returns:
            p_T of the kept ids `[R, K]`; the mass of all other tokens `[R]`; the sampled ids `[R, D]`. Each sample
            stands for an equal share of that mass, so a token's shares add up to its p_T in expectation. Kept and tail
            masses sum to 1.

        Raises:
            ValueError: If the temperature was not stored.
        """
        kept_RK = self.logprobs_RK / temperature
        if not self.codec.num_sampled:
            return kept_RK.softmax(-1), kept_RK.new_zeros(len(kept_RK)), self.tail_ids[0]
        stored = (1.0, *self.codec.temperatures)
        if temperature not in stored:
            raise ValueError(f"temperature {temperature} was not stored, only {list(stored)}")
        tail_R = self.tails_RX[:, stored.index(temperature)]
        # The stored sums normalise: rounded log-probabilities alone would not leave a tail of 1e-6 right.
        log_partition_R = torch.logaddexp(kept_RK.logsumexp(-1), tail_R)
        probs_RK, mass_R = (kept_RK - log_partition_R[:, None]).exp(), (tail_R - log_partition_R).exp()
        return probs_RK, mass_R, self.tail_ids[stored.index(temperature)]

    def gradient_noise(self, temperature: float = 1.0) -> float:
        """Noise of the forward loss's gradient with respect to logits over its size, for a student off by 1.

        The student's logits differ from the teacher's by independent errors of a small deviation s: the noise is this
        number over s times the gradient. Noise is the root of the summed variances at their bound, tail**2 / D a row.
        The gradient p (e - sum p e) / T, with e = s / T, is that of the kept tokens alone, so the ratio is rather too
        large. Of rows added up, both grow as the root of their number. 0 where nothing is sampled.

        Raises:
            ValueError: As `probabilities`.
        """
        probs_RK, mass_R, sampled_RD = self.probabilities(temperature)
        squares_RK = probs_RK.double().square()
        slope = (squares_RK * (1 - 2 * probs_RK + squares_RK.sum(-1, keepdim=True))).sum()
        noise = mass_R.double().square().sum() / max(sampled_RD.shape[1], 1)
        return temperature * float((noise / slope.clamp(min=torch.finfo(slope.dtype).tiny)).sqrt())

    def fault(self) -> str | None:
        """What no teacher says: ids past the vocabulary, NaN, or probabilities far from 1 in sum; None if sound."""
        ids = torch.cat([self.ids_RK, *self.tail_ids], dim=1)
        if bool((ids >= self.codec.vocab_size).any()):
            return f"token id {int(ids.max())}, past the vocabulary of {self.codec.vocab_size}"
        floats = torch.cat([self.logprobs_RK, self.tails_RX], dim=1)
        if bool(floats.isnan().any()) or bool((floats == torch.inf).any()):
            return "NaN or infinite values"
        total_R = torch.logaddexp(self.logprobs_RK.logsumexp(-1), self.tails_RX[:, 0]).exp()
        if bool(((total_R - 1).abs() > MAX_MASS_ERROR).any()):
            worst = float(total_R[(total_R - 1).abs().argmax()])
            return f"probabilities that sum to {worst:.4f}"
        return None


@dataclass(frozen=True)
class AnswerLogitsCodec:
    """Codes answer rows as records, and decodes them."""

    config: LogitCodecConfig

    def encode(self, logits_RV: Tensor, addresses_R: Tensor) -> Tensor:
        """Code answer rows.

        *Tail samples* (`sample_tail`). Each token that is not kept is sampled D r(i) times on average, where r(i) is
        p(i) / tail mass, at each temperature with that temperature's p, tail and D. So the estimate of p that gives
        each sample the weight tail / D is *unbiased* for every token, and so is the gradient of the cross entropy,
        (q - p) / T, for any student q. The *variance* of the estimate, summed over tokens, is (tail / D)**2 * sum f (1
        - f) with f the fractional part of D r(i): at most tail**2 / D. Proportional to p is also the best proposal: sum
        p**2 / r is least there. Above temperature 1 the tail is larger and the gradient smaller, so that more samples
        leave more noise (`AnswerLogits.gradient_noise`, `benchmarks/tempered_logits.py`).

        *Error of `levels`.* The first `num_exact` log-probabilities and the lowest are float16 (2**-11 relative). One
        between them, at depth x = (top - l) / (top - lowest), has level round((num_levels - 1) * sqrt(x)): steps are
        small where probability is. It is off by at most range * (sqrt(x) / (num_levels - 1) + 1 / (4 (num_levels -
        1)**2)), range = top - lowest. KL over the kept tokens and the tail stays below 3e-5 on all rows of
        `benchmarks/answer_logits.py`. Tails are float32, and not one minus the stored values, which would be noise
        where the tail is smaller than their rounding.

        Args:
            logits_RV: `[R, V]` floating point; -inf forbids a token. Any device. Sums are taken in float64.
            addresses_R: `[R]` float64 in [0, 1), see `row_addresses`.

        Returns:
            `[R, Q]` uint8 records on the same device.

        Raises:
            ValueError: If logits are NaN or +inf, a row has no finite logit, or V is not the codec's.
        """
        config = self.config
        if logits_RV.ndim != 2 or not logits_RV.is_floating_point() or logits_RV.shape[1] != config.vocab_size:
            found = f"{logits_RV.dtype} {tuple(logits_RV.shape)}"
            raise ValueError(f"logits are {found}, expected floats [R, {config.vocab_size}]")
        if addresses_R.shape != logits_RV.shape[:1] or not bool(((addresses_R >= 0) & (addresses_R < 1)).all()):
            raise ValueError(f"addresses are {tuple(addresses_R.shape)}, expected one in [0, 1) for each row")
        addresses_R = addresses_R.to(logits_RV.device, torch.float64)
        parts = (torch.split(part, _ROWS_AT_ONCE) for part in (logits_RV.detach(), addresses_R))
        records = [self._encode_block(rows_RV, rows_R) for rows_RV, rows_R in zip(*parts, strict=True) if len(rows_R)]
        return torch.cat([torch.zeros((0, config.row_bytes), dtype=torch.uint8, device=logits_RV.device), *records])

    def decode(self, records_RQ: Tensor) -> AnswerLogits:
        """Decode `[R, Q]` uint8 records on their device, within the bounds stated at `encode`.

        Raises:
            ValueError: If type or size are not the codec's.
        """
        config = self.config
        if records_RQ.dtype != torch.uint8 or records_RQ.ndim != 2 or records_RQ.shape[1] != config.row_bytes:
            found = f"{records_RQ.dtype} {tuple(records_RQ.shape)}"
            raise ValueError(f"records are {found}, expected torch.uint8 [R, {config.row_bytes}]")
        sizes = config.sections
        parts = dict(zip(sizes, torch.split(records_RQ, list(sizes.values()), dim=1), strict=True))
        num_temperatures = len(config.temperatures)
        tempered_ids = unpack_integers(
            parts["tempered_sample_ids"], num_temperatures * config.num_tempered, config.id_bits
        )
        return AnswerLogits(
            codec=config,
            ids_RK=unpack_integers(parts["ids"], config.num_kept, config.id_bits),
            logprobs_RK=decode_kept(config, parts["values"], parts["levels"]),
            tails_RX=floats_from_bytes(parts["tails"], torch.float32),
            tail_ids=(
                unpack_integers(parts["tail_sample_ids"], config.num_sampled, config.id_bits),
                *tempered_ids.tensor_split(max(num_temperatures, 1), dim=1)[:num_temperatures],
            ),
        )

    def fault(self, records_RQ: Tensor) -> str | None:
        """What no teacher says, as of `AnswerLogits.fault`, or bits that a record of this codec has not.

        A codec of one id more or less may have records of the same size.
        """
        if (wrong := self.decode(records_RQ).fault()) is not None:
            return wrong
        config, sizes = self.config, self.config.sections
        parts = dict(zip(sizes, torch.split(records_RQ, list(sizes.values()), dim=1), strict=True))
        used = {
            "ids": config.num_kept * config.id_bits,
            "levels": config.num_level_bits,
            "tail_sample_ids": config.num_sampled * config.id_bits,
            "tempered_sample_ids": len(config.temperatures) * config.num_tempered * config.id_bits,
        }
        for name, num_bits in used.items():
            if num_bits % 8 and bool((parts[name][:, -1] >> num_bits % 8).any()):
                return f"{name} of more than {num_bits} bits"
        if bool((unpack_narrow(parts["levels"], config.num_level_bits, 1).sum(dim=1) != config.num_coded).any()):
            return f"levels of another number of values than {config.num_coded}"
        return None

    def _encode_block(self, logits_RV: Tensor, addresses_R: Tensor) -> Tensor:
        config, exact_RV = self.config, logits_RV.double()
        log_partition_R1 = exact_RV.logsumexp(-1, keepdim=True)
        if not bool(torch.isfinite(log_partition_R1).all()):
            raise ValueError("a row of logits holds NaN or +inf, or no finite value; the teacher's run is broken")
        logprobs_RV = exact_RV - log_partition_R1
        ids_RK = _top_ids(logits_RV, config.num_kept)
        kept_RK = logprobs_RV.gather(1, ids_RK)
        others_RV = logprobs_RV.scatter_(1, ids_RK, -torch.inf)
        sums: list[Tensor] = []
        samples: list[Tensor] = []
        for temperature in (1.0, *config.temperatures):
            running_RV = (others_RV / temperature).exp_().cumsum(-1)
            count = config.num_tempered if samples else config.num_sampled
            sums.append(running_RV[:, -1])
            samples.append(sample_tail(running_RV, addresses_R, count))
        parts = [
            pack_integers(ids_RK, config.id_bits),
            *encode_kept(config, kept_RK),
            torch.stack(sums, dim=1).log().float().view(torch.uint8),
            pack_integers(samples[0], config.id_bits),
            pack_integers(torch.cat([samples[0][:, :0], *samples[1:]], dim=1), config.id_bits),
        ]
        return torch.cat(parts, dim=1)


def _top_ids(logits_RV: Tensor, num_kept: int) -> Tensor:
    """`[R, K]` int64: `torch.topk` leaves open which of equal logits it takes, and in which order."""
    smallest_R1 = logits_RV.topk(num_kept, dim=-1).values[:, -1:]
    above_RV, equal_RV = logits_RV > smallest_R1, logits_RV == smallest_R1
    num_wanted_R1 = num_kept - above_RV.sum(-1, keepdim=True)
    taken_RV = above_RV | (equal_RV & (equal_RV.cumsum(-1, dtype=torch.int32) <= num_wanted_R1))
    rising_ids_RK = taken_RV.nonzero()[:, 1].view(len(logits_RV), num_kept)
    order_RK = logits_RV.gather(1, rising_ids_RK).sort(dim=-1, descending=True, stable=True).indices
    return rising_ids_RK.gather(1, order_RK)
