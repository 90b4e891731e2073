"""The answers of a sample whose attention to the image is learnt, with what the teacher's was.

Shape letters: L captured layers, a answers, N image tokens, U answer rows of them all.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stages.attention.text_rows import AnswerQueries
from stages.conversations.answer_rows import answer_sizes
from stages.conversations.encoder import EncodedConversation


@dataclass(frozen=True)
class AnswerTargets:
    """One sample's.

    Attributes:
        stored_LaN: float16, what is stored of these answers.
        rows_U: int64 on the CPU, the student's answer rows, one answer after the other.
        sizes: Rows of each answer.
    """

    stored_LaN: Tensor
    rows_U: Tensor
    sizes: tuple[int, ...]

    def queries(self, images_N: Tensor) -> AnswerQueries:
        """What is captured of the student, whose image tokens are at `images_N`."""
        return AnswerQueries(self.rows_U, self.sizes, images_N)

    def to(self, device: torch.device) -> "AnswerTargets":
        """With the teacher's side on a device."""
        return replace(self, stored_LaN=self.stored_LaN.to(device, non_blocking=True))


NO_ANSWERS = AnswerQueries(torch.zeros(0, dtype=torch.long), (), torch.zeros(0, dtype=torch.long))
"""Of a sample without any."""


def answer_targets(read: EncodedConversation, stored_LaN: Tensor | None) -> AnswerTargets | None:
    """Pairs the answers that the student reads with those that are stored, in their order.

    A student with another tokenizer may read an answer more or less, where conversations were cut. An answer before
    which there is no image token looks at none and does not count.

    Returns:
        None where nothing is stored, or no answer is left.
    """
    if stored_LaN is None or not len(read.image_positions):
        return None
    rows_U, first_image = read.answer_mask.nonzero()[:, 0] - 1, int(read.image_positions[0])
    parts = torch.split(rows_U, list(answer_sizes(read.answer_mask)))[: stored_LaN.shape[1]] if len(rows_U) else ()
    kept = [number for number, part_U in enumerate(parts) if first_image <= int(part_U[0])]
    if not kept:
        return None
    rows = [parts[number] for number in kept]
    return AnswerTargets(stored_LaN[:, kept], torch.cat(rows), tuple(map(len, rows)))
