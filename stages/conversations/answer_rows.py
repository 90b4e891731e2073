"""The answer rows of a batch: the positions that predict an answer token, and these tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AnswerRows:
    """Answer rows in the order of the batch; int64.

    Attributes:
        sequence_R: Which sequence of the batch.
        position_R: The position that predicts the token, one before it.
        token_R: The answer token.
    """

    sequence_R: Tensor
    position_R: Tensor
    token_R: Tensor

    def __len__(self) -> int:
        return len(self.token_R)

    def to(self, device: torch.device) -> "AnswerRows":
        """The same on a device."""
        return AnswerRows(*(tensor.to(device, non_blocking=True) for tensor in vars(self).values()))


def answer_sizes(answer_mask_T: Tensor) -> tuple[int, ...]:
    """Tokens of each answer of a sequence, and so its answer rows: answers are the runs of True in its mask."""
    at = answer_mask_T.nonzero()[:, 0]
    if not len(at):
        return ()
    ends = torch.cat([(at.diff() > 1).nonzero()[:, 0] + 1, torch.tensor([len(at)])])
    return tuple(ends.diff(prepend=torch.tensor([0])).tolist())


def answer_rows(token_ids: Sequence[Tensor], answer_masks: Sequence[Tensor]) -> AnswerRows:
    """The answer rows of sequences that are padded on the right, if at all; masks are True at answer tokens."""
    parts = [(torch.zeros(0, dtype=torch.long),) * 3]
    for number, (ids, mask) in enumerate(zip(token_ids, answer_masks, strict=True)):
        at = mask.nonzero()[:, 0]
        parts.append((torch.full_like(at, number), at - 1, ids[at].long()))
    return AnswerRows(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
