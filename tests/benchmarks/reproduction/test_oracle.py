import torch

from benchmarks.reproduction.object_attention import auc, object_attention, object_tokens
from benchmarks.reproduction.oracle import oracle_maps
from benchmarks.reproduction.scenes import NUM_CELLS, draw_scenes

PLACE_B6 = torch.from_numpy(draw_scenes("validation", 0, 8).place_B6)


def test_a_row_of_the_oracle_is_a_causal_distribution_mostly_on_the_objects_before_it() -> None:
    maps_BNN = oracle_maps(PLACE_B6, NUM_CELLS)
    assert torch.allclose(maps_BNN.sum(-1), torch.ones(8, NUM_CELLS))
    assert (maps_BNN.triu(1) == 0).all()
    on_objects_BN = (maps_BNN * object_tokens(PLACE_B6, NUM_CELLS)[:, None]).sum(-1)
    last_B = PLACE_B6[:, -1]
    assert (on_objects_BN.gather(1, last_B[:, None]) > 0.9).all()


def test_auc_is_one_where_objects_score_highest_half_where_all_are_equal_and_zero_where_lowest() -> None:
    objects_BN = object_tokens(PLACE_B6, NUM_CELLS)
    score_BN = objects_BN.float()
    for scores, expected in ((score_BN, 1.0), (torch.zeros_like(score_BN), 0.5), (-score_BN, 0.0)):
        assert (auc(scores, objects_BN) == expected).all()


def test_the_oracle_tells_objects_apart_in_its_own_picture_only() -> None:
    found = object_attention(oracle_maps(PLACE_B6, NUM_CELLS), object_tokens(PLACE_B6, NUM_CELLS))
    assert found["all"] > 0.95
    assert 0.3 < found["other_picture"] < 0.7
