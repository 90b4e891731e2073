"""Seeded samples from the tokens of an answer row that are not kept."""

import hashlib

import torch
from torch import Tensor


def row_addresses(key: str, num_rows: int) -> Tensor:
    """`[R]` float64 in [0, 1): where the tail of each answer row of a sample is sampled.

    They follow from the sample's key and the row's number alone, so that batches, workers and restarts sample the same.
    """
    digests = [hashlib.sha256(f"{key}:{row}".encode()).digest() for row in range(num_rows)]
    numbers = [int.from_bytes(digest[:8], "little") >> 11 for digest in digests]
    return torch.tensor(numbers, dtype=torch.float64) * 2.0**-53


def sample_tail(running_RV: Tensor, addresses_R: Tensor, num_samples: int) -> Tensor:
    """`[R, D]` int64 ids: systematic samples of each row, each token in proportion to its mass.

    With r(i) the share of token i in the row's mass, F the running sum of r in the order of the ids, and u the row's
    address, the samples are the tokens where F passes (u + 0) / D, (u + 1) / D, ... For u uniform in [0, 1) the
    expected number of samples of token i is D r(i). The number itself is one of the two integers next to D r(i), which
    is the least variance that D samples of equal weight can have.

    Args:
        running_RV: `[R, V]` float64, running sum of the tokens' masses; a kept token has none.
        addresses_R: `[R]` float64 in [0, 1).
        num_samples: D. Where a row has no mass, each is token 0.
    """
    total_R1 = running_RV[:, -1:].contiguous()
    steps_D = torch.arange(num_samples, dtype=torch.float64, device=running_RV.device)
    positions_RD = (addresses_R[:, None] + steps_D) / max(num_samples, 1) * total_R1
    # Rounding may push the last position onto the sum itself, past the last token.
    positions_RD = torch.minimum(positions_RD, total_R1.nextafter(torch.zeros_like(total_R1)))
    # The first token whose sum is above the position: its own mass is above 0, so it is no kept one.
    ids_RD = torch.searchsorted(running_RV, positions_RD, right=True)
    return ids_RD.masked_fill(total_R1 == 0, 0)
