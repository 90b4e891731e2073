"""The settings of the codecs, which the manifest keeps; reading them needs no torch."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field

from storage.strict_model import StrictModel

EntryCodecName = Literal["float16", "sqrt8", "sqrt4", "sqrt2"]
MapCodecName = Literal["auto", EntryCodecName]
_BITS = {"float16": 16, "sqrt8": 8, "sqrt4": 4, "sqrt2": 2}
_CAP_FACTORS = {"auto": 3.0, "float16": 3.0, "sqrt8": 6.0, "sqrt4": 3.0, "sqrt2": 2.0}

SQRT8_BELOW, WIDE_WINDOW = 700, 5
"""Image tokens, and layers of a window, from which 4 bits keep the bounds of `docs/codecs.md`; `auto` takes 8 bits
below."""

MAX_CAP_FACTOR = 1000.0
TAIL_BLOCK_SHARE = 32
"""One of so many keys is in the tail block: a thousandth of the entries."""


def num_entries(num_tokens: int, causal: bool) -> int:
    """E: N(N+1)/2 for a causal map, N*N otherwise."""
    return num_tokens * (num_tokens + 1) // 2 if causal else num_tokens * num_tokens


def num_bytes(num_bits: int) -> int:
    """Bytes that hold so many bits."""
    return (num_bits + 7) // 8


class MapCodecConfig(StrictModel):
    """How maps are coded; its dict stands in the manifest and is all a reader needs to decode."""

    name: MapCodecName
    """`float16` is exact to rounding; `sqrt8`, `sqrt4` and `sqrt2` take 8, 4 and 2 bits an entry. `auto` is `sqrt8` for
    small maps and `sqrt4` for others."""
    causal: bool = True
    """Store the lower triangle only; False for models whose image tokens attend in both directions, and for maps of
    cells of several tokens."""
    sqrt8_below: int = Field(default=SQRT8_BELOW, ge=0, le=2**24)
    """auto only: maps of fewer image tokens are small."""
    cap_factor: float = Field(default_factory=lambda fields: _CAP_FACTORS[fields["name"]], gt=0, le=MAX_CAP_FACTOR)
    """sqrt codes only: values are cut at this many times the sink threshold (mean + std) of their map. The default is
    3, but 2 for `sqrt2`, whose steps are wide, and 6 for `sqrt8`, which has codes to spare. 1 would be too low: a
    window averages several layers, and one of them may lie above its threshold where the mean does not. Of `auto` it is
    that of large maps; small ones are cut at twice as much."""

    @classmethod
    def of_windows(cls, name: MapCodecName, windows: Sequence[Sequence[int]], *, causal: bool) -> Self:
        """The codec of a new store with these windows: the named one, but `sqrt8` for `auto` and narrow windows."""
        narrow = min(map(len, windows)) < WIDE_WINDOW
        return cls(name="sqrt8" if name == "auto" and narrow else name, causal=causal)

    def of_size(self, num_tokens: int) -> "MapCodecConfig":
        """The codec of a map of so many image tokens: the same one, unless this is `auto`."""
        if self.name != "auto":
            return self
        if num_tokens < self.sqrt8_below:
            return MapCodecConfig(name="sqrt8", causal=self.causal, cap_factor=min(2 * self.cap_factor, MAX_CAP_FACTOR))
        return MapCodecConfig(name="sqrt4", causal=self.causal, cap_factor=self.cap_factor)

    @property
    def bits(self) -> int:
        """Bits of one stored entry; of `auto` ask the codec `of_size`, as for `max_code`."""
        return _BITS[self.name]

    @property
    def max_code(self) -> int:
        """The highest code, whose value is the cap; 1 for float16, whose codes are the values."""
        return 1 if self.name == "float16" else 2**self.bits - 1

    def num_codes(self, num_tokens: int) -> int:
        """C: stored elements of one layer of one map, of which each byte holds 8 / bits entries."""
        entries, bits = num_entries(num_tokens, self.causal), self.of_size(num_tokens).bits
        return entries if bits >= 8 else num_bytes(entries * bits)

    def tail_block_size(self, num_tokens: int) -> int:
        """Z: how many of a causal map's last keys, which few queries see, are stored as float16 beside their codes."""
        return -(-num_tokens // TAIL_BLOCK_SHARE) if self.causal else 0


def _check_temperatures(given: tuple[float, ...]) -> tuple[float, ...]:
    if len(set(given)) < len(given) or any(not 0.01 <= t <= 100 or t == 1 for t in given):
        raise ValueError(f"temperatures {given} are not distinct, from 0.01 to 100 and other than 1")
    return given


DEFAULT_TOP_K, TEMPERED_TOP_K, SMALL_VOCABULARY = 48, 256, 1024
"""Tokens kept of each row where nothing else is asked for: at temperature 1 alone, and at others too; for these a small
vocabulary is kept whole."""
MAX_TOP_K = 10_000_000
DEFAULT_NUM_LEVELS, WHOLE_NUM_LEVELS = 128, 4096


def default_top_k(vocab_size: int, temperatures: tuple[float, ...]) -> int:
    """Tokens kept of each row for temperature 1 and these."""
    if not temperatures:
        return DEFAULT_TOP_K
    return vocab_size if vocab_size <= SMALL_VOCABULARY else TEMPERED_TOP_K


def default_num_levels(vocab_size: int, top_k: int, temperatures: tuple[float, ...]) -> int:
    """Steps between the kept log-probabilities of a row, more for a whole vocabulary at other temperatures.

    Its rare tokens weigh there, and 128 steps from the likeliest to the rarest are coarse
    (`benchmarks/tempered_logits.py`).
    """
    return WHOLE_NUM_LEVELS if temperatures and top_k >= vocab_size else DEFAULT_NUM_LEVELS


NumTailSamples = Annotated[int, Field(ge=1, le=1_000_000)]
Temperatures = Annotated[tuple[float, ...], AfterValidator(_check_temperatures)]
"""Of settings too, so that a value that cannot be stored is refused where it is given."""


class LogitCodecConfig(StrictModel):
    """How an answer row is coded; its dict stands in the manifest and is all a reader needs to decode."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    name: Literal["float16", "levels"] = "levels"
    """`float16` keeps every log-probability in 2 bytes; `levels` 9 of them, and about 4 bits of each other."""
    vocab_size: int = Field(ge=1, le=2**24)
    """V: width of the teacher's logits."""
    top_k: int = Field(default=DEFAULT_TOP_K, ge=1, le=MAX_TOP_K)
    """Tokens kept of each row; more than V means all."""
    num_tail_samples: NumTailSamples = Field(default=30, alias="num_draws")
    """Tokens sampled from the others; the variance of the loss's gradient falls as one over this."""
    temperatures: Temperatures = ()
    """Temperatures besides 1 at which a student may be distilled."""
    num_tempered_samples: NumTailSamples = 256
    """Tokens sampled for each of `temperatures`, from the others as likely as they are at that temperature."""
    num_exact: int = Field(default=8, ge=1, le=MAX_TOP_K)
    """levels only: log-probabilities in float16 before the coded ones."""
    num_levels: int = Field(default=DEFAULT_NUM_LEVELS, ge=64, le=4096)
    """levels only: steps between the last exact log-probability and the lowest kept one."""

    @property
    def num_kept(self) -> int:
        """K."""
        return min(self.top_k, self.vocab_size)

    @property
    def num_sampled(self) -> int:
        """D: `num_tail_samples`, or 0 where the whole vocabulary is kept."""
        return 0 if self.num_kept == self.vocab_size else self.num_tail_samples

    @property
    def num_tempered(self) -> int:
        """`num_tempered_samples`, or 0 where the whole vocabulary is kept."""
        return self.num_tempered_samples if self.num_sampled else 0

    @property
    def id_bits(self) -> int:
        """Bits of a token id."""
        return max(1, (self.vocab_size - 1).bit_length())

    @property
    def num_values(self) -> int:
        """F: log-probabilities in float16, the last of them the lowest kept one."""
        return self.num_kept if self.name == "float16" else min(self.num_kept, self.num_exact + 1)

    @property
    def num_coded(self) -> int:
        """I: log-probabilities between the last exact one and the lowest."""
        return self.num_kept - self.num_values

    @property
    def num_level_bits(self) -> int:
        """J: bits of the coded log-probabilities: one for each, one for each step from a level to the next."""
        return self.num_coded + self.num_levels - 1 if self.num_coded else 0

    @property
    def sections(self) -> dict[str, int]:
        """Name -> bytes of each part of a record, in stored order."""
        return {
            "ids": num_bytes(self.num_kept * self.id_bits),
            "values": 2 * self.num_values,
            "levels": num_bytes(self.num_level_bits),
            "tails": 4 * (1 + len(self.temperatures)),
            "tail_sample_ids": num_bytes(self.num_sampled * self.id_bits),
            "tempered_sample_ids": num_bytes(len(self.temperatures) * self.num_tempered * self.id_bits),
        }

    @property
    def row_bytes(self) -> int:
        """Q."""
        return sum(self.sections.values())

    def serves(self, temperature: float) -> bool:
        """Whether a student can be distilled at this temperature; at any, if the whole vocabulary is stored."""
        return temperature in (1.0, *self.temperatures) or not self.num_sampled
