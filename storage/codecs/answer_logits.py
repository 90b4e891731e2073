"""The codec of answer rows: a row's top-k, tail mass and tail samples in a record of about 200 bytes.

A record is what `LogitCodecConfig.sections` lists, one part after another: the K likeliest ids by falling
probability; their log-probabilities; for each temperature the log of what all other tokens add; the ids and
log-probabilities of D tokens sampled from these others. FORMAT.md says the same bit by bit.
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
    tail_ids_RD: Tensor
    """int64, sampled from the tokens that are not kept, each with probability proportional to exp(l)."""
    tail_logprobs_RD: Tensor
    """float32, their l; `[R, 0]` if no temperature besides 1 is stored."""

    def __len__(self) -> int:
        return len(self.ids_RK)

    def probabilities(self, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher's distribution at a temperature: exact on the kept ids, in expectation on all others.

        Returns:
            p_T of the kept ids `[R, K]`; the mass of all other tokens `[R]`; weights of the sampled ids `[R, D]`.
            A token's weights add up to its p_T in expectation: a sample weighs p_T / (D r), where r is the probability
            it was sampled with. Kept and tail masses sum to 1.

        Raises:
            ValueError: If the temperature was not stored.
        """
        kept_RK = self.logprobs_RK / temperature
        num_samples = self.tail_ids_RD.shape[1]
        if not num_samples:
            nothing_R = kept_RK.new_zeros(len(kept_RK))
            return kept_RK.softmax(-1), nothing_R, nothing_R[:, None].expand(-1, 0)
        stored = (1.0, *self.codec.temperatures)
        if temperature not in stored:
            raise ValueError(f"temperature {temperature} was not stored, only {list(stored)}")
        tail_R = self.tails_RX[:, stored.index(temperature)]
        # The stored sums normalise: rounded log-probabilities alone would not leave a tail of 1e-6 right.
        log_partition_R = torch.logaddexp(kept_RK.logsumexp(-1), tail_R)
        probs_RK, mass_R = (kept_RK - log_partition_R[:, None]).exp(), (tail_R - log_partition_R).exp()
        if temperature == 1:
            return probs_RK, mass_R, (mass_R / num_samples)[:, None].expand(-1, num_samples)
        # p_T / (D r) with p_T = exp(l / T) / Z and r = exp(l) / tail.
        log_ratio_RD = self.tails_RX[:, :1] + self.tail_logprobs_RD * (1 / temperature - 1) - log_partition_R[:, None]
        weights_RD = log_ratio_RD.exp() / num_samples
        return probs_RK, mass_R, weights_RD.masked_fill((mass_R == 0)[:, None], 0.0)

    def fault(self) -> str | None:
        """What no teacher says: ids past the vocabulary, NaN, or probabilities far from 1 in sum; None if sound."""
        ids = torch.cat([self.ids_RK, self.tail_ids_RD], dim=1)
        if bool((ids >= self.codec.vocab_size).any()):
            return f"token id {int(ids.max())}, past the vocabulary of {self.codec.vocab_size}"
        floats = torch.cat([self.logprobs_RK, self.tails_RX, self.tail_logprobs_RD], dim=1)
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
        p(i) / tail mass. So the estimate of p that gives each sample the weight tail / D is *unbiased* for every token,
        and so is the gradient of the cross entropy, q - p, for any student q. Its *variance*, summed over tokens, is
        (tail / D)**2 * sum f (1 - f) with f the fractional part of D r(i): at most tail**2 / D. Proportional to p is
        also the best proposal at temperature 1: sum p**2 / r is least there. At other temperatures samples weigh
        p_T / (D r): unbiased too, but with much more variance above 1, where rare tokens count more than they are
        sampled (`benchmarks/answer_logits.py`).

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
        return AnswerLogits(
            codec=config,
            ids_RK=unpack_integers(parts["ids"], config.num_kept, config.id_bits),
            logprobs_RK=decode_kept(config, parts["values"], parts["levels"]),
            tails_RX=floats_from_bytes(parts["tails"], torch.float32),
            tail_ids_RD=unpack_integers(parts["tail_sample_ids"], config.num_sampled, config.id_bits),
            tail_logprobs_RD=floats_from_bytes(parts["tail_sample_values"], torch.float16),
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
        running_RV = others_RV.exp().cumsum(-1)
        tail_ids_RD = sample_tail(running_RV, addresses_R, config.num_sampled)
        sums = [running_RV[:, -1], *((others_RV / t).exp_().sum(-1) for t in config.temperatures)]
        parts = [
            pack_integers(ids_RK, config.id_bits),
            *encode_kept(config, kept_RK),
            torch.stack(sums, dim=1).log().float().view(torch.uint8),
            pack_integers(tail_ids_RD, config.id_bits),
            others_RV.gather(1, tail_ids_RD[:, : config.num_sampled_values]).half().view(torch.uint8),
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
