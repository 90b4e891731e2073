"""Maps by construction: where an image token of this world should look. The ceiling of what guided attention can do.

Shape letters are those of docs/architecture.md; a picture has six objects.
"""

import torch
from torch import Tensor

SHARE = 0.9
"""Of an image token's attention that goes to objects; the rest is spread evenly, so that no entry is zero."""


def oracle_maps(place_B6: Tensor, num_tokens: int) -> Tensor:
    """`[B, N, N]`: each token looks evenly at the objects up to itself; before the first object at everything."""
    is_object_BN = torch.zeros(len(place_B6), num_tokens).scatter_(1, place_B6, 1.0)
    causal_NN = torch.ones(num_tokens, num_tokens).tril()
    even_NN = causal_NN / causal_NN.sum(-1, keepdim=True)
    objects_BNN = is_object_BN[:, None] * causal_NN
    count_BN1 = objects_BNN.sum(-1, keepdim=True)
    return torch.where(count_BN1 > 0, SHARE * objects_BNN / count_BN1.clamp(min=1) + (1 - SHARE) * even_NN, even_NN)
