"""Cells of neighbouring image tokens: sums and means as written out, and which queries see which keys."""

import pytest
import torch

from storage.codecs.attention_maps import MapCodec
from storage.codecs.codec_settings import MapCodecConfig
from storage.codecs.sinks import sink_keep_mask
from storage.codecs.token_cells import TokenCells, attended_cells, cells_fault
from storage.codecs.windows import window_means
from tests.storage.builders import random_maps

CELLS = torch.tensor([0, 0, 1, 1, 2, 0, 0, 1, 1, 2, 3, 3, 4, 4, 5], dtype=torch.int32)
"""Of 3 rows of 5 tokens, 2x2 each: rims of one column and one row."""


def one_hot(cells: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(cells.long()).double()


def test_a_pooled_map_is_the_mean_over_queries_of_the_sum_over_keys() -> None:
    map_XX = random_maps(1, len(CELLS), seed=0)[0].double()
    members_XN = one_hot(CELLS)
    expected = members_XN.T @ map_XX @ members_XN / members_XN.sum(0)[:, None]
    found = TokenCells.of(CELLS).pooled(map_XX)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-16)
    by_hand = [sum(float(map_XX[i, j]) for j in (2, 3, 7, 8)) for i in (4, 9)]
    assert float(found[2, 1]) == pytest.approx(sum(by_hand) / 2, rel=1e-14)


def test_the_gradient_of_a_pooled_map_is_that_of_finite_differences() -> None:
    cells = TokenCells.of(CELLS)
    map_XX = random_maps(1, len(CELLS), seed=1)[0].double().requires_grad_()
    assert torch.autograd.gradcheck(cells.pooled, (map_XX,))


def test_what_is_attended_is_what_any_token_of_the_query_sees() -> None:
    seen_XX = torch.ones(len(CELLS), len(CELLS), dtype=torch.float64).tril()
    members_XN = one_hot(CELLS)
    expected = members_XN.T @ seen_XX @ members_XN > 0
    found = attended_cells(CELLS)
    assert torch.equal(found, expected)
    assert bool(found[0, 2])
    assert not bool(found[0, 3])


@pytest.mark.parametrize("cells", [[1, 0], [0, 2, 1], [-1, 0], []])
def test_cells_that_are_not_numbered_by_their_first_tokens_are_a_fault(cells: list[int]) -> None:
    found = torch.tensor(cells, dtype=torch.int32)
    assert cells_fault(found, len(set(cells)))
    assert cells_fault(CELLS, 6) is None
    assert cells_fault(CELLS, 7) == "6 cells for a map of 7"


@pytest.mark.parametrize("name", ["float16", "sqrt8", "sqrt4", "sqrt2"])
def test_coded_maps_of_cells_have_the_exact_masks_and_store_no_flip_where_nothing_is_seen(name: str) -> None:
    side = 12
    grid = torch.arange(side) // 2
    cells = (grid[:, None] * (side // 2) + grid).flatten().int()
    maps_LXX = random_maps(3, side * side, seed=2)
    maps_LNN = torch.stack([TokenCells.of(cells).pooled(one) for one in maps_LXX])
    rows = ((0, 1), (1, 2))
    codec = MapCodec(MapCodecConfig(name=name, causal=False), rows)
    encoded = codec.encode(maps_LNN, cells)
    codec.check(encoded)
    exact_WNN = window_means(maps_LNN, rows)
    found_WNN, keep_WNN = codec.decode_windows(encoded)
    assert torch.equal(keep_WNN, sink_keep_mask(exact_WNN))
    unseen = int((~attended_cells(cells)).sum())
    assert len(codec.decode_flips(encoded)) < unseen
    assert float((found_WNN * ~attended_cells(cells)).abs().max()) == 0
    _, other_keep = codec.estimate_windows(encoded, ((0, 1, 2),))
    assert not bool((other_keep & ~attended_cells(cells)).any())
