"""How well a map's pooled attention tells objects from background, and whether it follows the picture."""

import torch
from torch import Tensor

from stages.student.losses.attention import below_sink_threshold, pool_keys


def object_attention(maps_BNN: Tensor, is_object_BN: Tensor) -> dict[str, float]:
    """AUC of object against background tokens, mean over pictures, by what is pooled.

    `sink_free` pools as the published loss does, `all` pools every entry. `other_picture` pools every entry of the
    picture before: .5 where a map says nothing but of its own picture. `kept` is the share of the attention on object
    tokens that lies in entries which the published mask keeps.
    """
    causal_BNN = maps_BNN > 0
    keep_BNN = causal_BNN & below_sink_threshold(maps_BNN)
    whole_BN = pool_keys(maps_BNN, causal_BNN)
    on_objects_BNN = maps_BNN * is_object_BN[:, None]
    return {
        "sink_free": round(float(auc(pool_keys(maps_BNN, keep_BNN), is_object_BN).mean()), 3),
        "all": round(float(auc(whole_BN, is_object_BN).mean()), 3),
        "other_picture": round(float(auc(whole_BN.roll(1, 0), is_object_BN).mean()), 3),
        "share_on_objects": round(float(on_objects_BNN.sum() / maps_BNN.sum()), 3),
        "kept": round(float((on_objects_BNN * keep_BNN).sum() / on_objects_BNN.sum()), 3),
    }


def auc(score_BN: Tensor, positive_BN: Tensor) -> Tensor:
    """`[B]`: how often a positive scores above a negative; a tie counts half."""
    difference_BNN = score_BN[:, :, None] - score_BN[:, None, :]
    pairs_BNN = positive_BN[:, :, None] & ~positive_BN[:, None, :]
    wins_BNN = (difference_BNN > 0).float() + 0.5 * (difference_BNN == 0).float()
    return (wins_BNN * pairs_BNN).sum((1, 2)) / pairs_BNN.sum((1, 2))


def object_tokens(place_B6: Tensor, num_tokens: int) -> Tensor:
    """`[B, N]` bool."""
    return torch.zeros(len(place_B6), num_tokens, dtype=torch.bool).scatter_(1, place_B6, True)
