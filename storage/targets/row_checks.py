"""Checks that the rows of a shard's small arrays belong to each other; each says what was found and expected."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from storage.codecs.token_cells import cells_fault

_Array = np.ndarray[Any, Any]


class RowFault(NamedTuple):
    """What is wrong."""

    array: str
    found: str
    expected: str


def answers_fault(small: Mapping[str, _Array], map_sizes: Sequence[int]) -> RowFault | None:
    """Each sample with a map must have a value for each of its answers and entries of a row, others none."""
    begins = small["answer_mask"].copy()
    begins[1:] &= ~small["answer_mask"][:-1]
    firsts = small["token_offsets"][:-1]
    inside = firsts[firsts < len(begins)]
    begins[inside] = small["answer_mask"][inside]
    num_answers = np.diff(np.concatenate([np.zeros(1, np.int64), begins.cumsum()])[small["token_offsets"]])
    num_values = np.array([map_sizes[row] if row >= 0 else 0 for row in small["map_rows"].tolist()])
    wrong = np.flatnonzero(np.diff(small["answer_attention_offsets"]) != num_answers * num_values)
    if not len(wrong):
        return None
    expected = f"{num_answers[wrong[0]]} answers of {num_values[wrong[0]]} values each"
    return RowFault("answer_attention_offsets", f"another size at sample {wrong[0]}", expected)


def map_cells_fault(small: Mapping[str, _Array], map_sizes: Sequence[int]) -> RowFault | None:
    """Each map must have the cell of each of its image tokens."""
    parts = torch.split(torch.from_numpy(small["map_cells"]), np.diff(small["map_cell_offsets"]).tolist())
    for row, (cells_X, num_cells) in enumerate(zip(parts, map_sizes, strict=True)):
        if bad := cells_fault(cells_X, num_cells):
            return RowFault("map_cells", f"{bad} at map {row}", "the cell of each image token, from 0")
    return None
