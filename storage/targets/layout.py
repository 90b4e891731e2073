"""The arrays of one shard: names, types, chunks and codecs. FORMAT.md says the same in words.

Letters: S samples, U bytes of their keys, T tokens, R answer rows, Q bytes of a row's record, M maps, W windows, L
captured layers, P pairs of them; of all maps together N image tokens, C codes and Y tail block entries of one layer, G
bytes of flips; H values of answer attention of one layer, of all samples. Of maps of cells, N counts cells, and X the
image tokens that make them up.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ArraySpec:
    """One array of the group."""

    name: str
    dtype: str
    """Zarr v3 data type; of several, the manifest's codec says which."""
    letters: str
    """Its dimensions, one letter each; `S+1` are offsets."""
    sharded: bool = False
    """Many inner chunks in one file, for reading a part; otherwise the array is one chunk."""

    @property
    def is_offsets(self) -> bool:
        """Whether it says where each item of another array begins, and where the last one ends."""
        return self.letters.endswith("+1")

    def shape(self, sizes: Mapping[str, int]) -> tuple[int | None, ...]:
        """Its shape by what the letters stand for; None for a letter that `sizes` lacks."""
        return (sizes[self.letters[0]] + 1,) if self.is_offsets else tuple(map(sizes.get, self.letters))


ARRAYS = (
    ArraySpec("sample_keys", "uint8", "U"),
    ArraySpec("sample_key_offsets", "int64", "S+1"),
    ArraySpec("token_ids", "int32", "T"),
    ArraySpec("answer_mask", "bool", "T"),
    ArraySpec("token_offsets", "int64", "S+1"),
    ArraySpec("cut_answer_tokens", "int32", "S"),
    ArraySpec("map_rows", "int64", "S"),
    ArraySpec("sample_turned", "bool", "S"),
    ArraySpec("logit_records", "uint8", "RQ", sharded=True),
    ArraySpec("logit_offsets", "int64", "S+1"),
    ArraySpec("map_num_tokens", "int32", "M"),
    ArraySpec("map_caps", "float32", "LM"),
    ArraySpec("map_means", "float32", "LM"),
    ArraySpec("map_covariances", "float32", "PM"),
    ArraySpec("map_codes", "uint8|float16", "LC", sharded=True),
    ArraySpec("map_code_offsets", "int64", "M+1"),
    ArraySpec("map_corners", "float16", "LY", sharded=True),
    ArraySpec("map_corner_offsets", "int64", "M+1"),
    ArraySpec("window_thresholds", "float32", "WM"),
    ArraySpec("window_shifts", "float16", "WN", sharded=True),
    ArraySpec("window_flips", "uint8", "G", sharded=True),
    ArraySpec("window_flip_offsets", "int64", "M+1"),
)
ANSWER_ARRAYS = (
    ArraySpec("answer_attention", "float16", "LH", sharded=True),
    ArraySpec("answer_attention_offsets", "int64", "S+1"),
)
CELL_ARRAYS = (
    ArraySpec("map_cells", "int32", "X"),
    ArraySpec("map_cell_offsets", "int64", "M+1"),
)
ALL_ARRAYS = (*ARRAYS, *ANSWER_ARRAYS, *CELL_ARRAYS)


def arrays(*, answer_attention: bool, pooled: bool) -> tuple[ArraySpec, ...]:
    """The arrays of a shard of a store with or without answer attention, and with maps of cells or of tokens."""
    return (*ARRAYS, *(ANSWER_ARRAYS if answer_attention else ()), *(CELL_ARRAYS if pooled else ()))
