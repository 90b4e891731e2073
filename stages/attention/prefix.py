"""Keys and values of what several conversations begin with: recorded once, and put before each one's own.

Nothing of transformers' caches is used. Both objects travel to the attention function as the keyword `prefix`, beside
`capture`, and see keys with their rotary positions applied. So they work wherever maps can be captured. What a layer
needs is kept on the device where it computes.

Shape letters: as in `stages/attention/capture.py`; P prefixes, p their padded length, t tokens after it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class PrefixRecord:
    """Keys and values of each layer in a forward pass over prefixes.

    Attributes:
        lengths: tokens of each prefix; what lies behind them in the padded row is zeroed, so that nothing of it, NaN
            neither, reaches a conversation.
        states: filled by the forward pass: layer -> keys and values, `[P, g, p, d]` each.
        windows: filled too: layer -> how many tokens back it sees, itself included; None for all.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self.states: dict[int, tuple[Tensor, Tensor]] = {}
        self.windows: dict[int, int | None] = {}
        self._behind_P1p1: dict[torch.device, Tensor] = {}

    def at_layer(
        self, layer: int, key_PgTd: Tensor, value_PgTd: Tensor, attention_mask: Tensor | None, window: int | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and mask as they came; a copy of the first two is kept."""
        device = key_PgTd.device
        if device not in self._behind_P1p1:
            lengths_P1 = torch.tensor(self.lengths, device=device)[:, None]
            behind_Pp = torch.arange(key_PgTd.shape[2], device=device) >= lengths_P1
            self._behind_P1p1[device] = behind_Pp[:, None, :, None]
        kept = (states.masked_fill(self._behind_P1p1[device], 0) for states in (key_PgTd, value_PgTd))
        self.states[layer], self.windows[layer] = (next(kept), next(kept)), window
        return key_PgTd, value_PgTd, attention_mask


class PrefixContinuation:
    """What rows of a batch go on from: one prefix of `record` each, `rows` says which."""

    def __init__(self, record: PrefixRecord, rows: Sequence[int]) -> None:
        self._record = record
        self._rows, self._lengths = list(rows), [record.lengths[row] for row in rows]
        self._rows_B: dict[torch.device, Tensor] = {}
        self._masks: dict[tuple[torch.device, int | None], Tensor] = {}

    def at_layer(
        self, layer: int, key_Bgtd: Tensor, value_Bgtd: Tensor, attention_mask: Tensor | None, window: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values behind those of the prefixes, `[B, g, p + t, d]`, and the mask `[B, 1, t, p + t]` of both.

        The mask that came is of the rows alone. It may say no more than what is known here: that they are causal, and
        how far a layer sees.
        """
        keys_Pgpd, values_Pgpd = self._record.states[layer]
        device = key_Bgtd.device
        if device not in self._rows_B:
            self._rows_B[device] = torch.tensor(self._rows, device=device)
        if (device, window) not in self._masks:
            self._masks[device, window] = self._mask(keys_Pgpd.shape[2], key_Bgtd.shape[2], window, device)
        rows_B = self._rows_B[device]
        key_BgTd = torch.cat([keys_Pgpd[rows_B], key_Bgtd], 2)
        return key_BgTd, torch.cat([values_Pgpd[rows_B], value_Bgtd], 2), self._masks[device, window]

    def _mask(self, num_before: int, num_own: int, window: int | None, device: torch.device) -> Tensor:
        """Bool, True where a row's token may look; between a prefix and its padded length nobody does."""
        lengths_B1 = torch.tensor(self._lengths, device=device)[:, None]
        before_1p, own_1t = (torch.arange(size, device=device)[None] for size in (num_before, num_own))
        at_BT = torch.cat([before_1p.expand(len(lengths_B1), -1), lengths_B1 + own_1t], 1)
        is_token_BT = torch.cat([before_1p < lengths_B1, torch.ones_like(lengths_B1 + own_1t, dtype=torch.bool)], 1)
        back_BtT = at_BT[:, num_before:, None] - at_BT[:, None]
        allowed_BtT = (back_BtT >= 0) & is_token_BT[:, None]
        if window is not None:
            allowed_BtT &= back_BtT < window
        return allowed_BtT[:, None]
