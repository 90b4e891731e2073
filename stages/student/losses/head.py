"""Losses of the language modelling head at answer rows, with a bounded number of logits at a time.

Shape letters: R answer rows, d hidden size, V vocabulary, K stored ids of a row.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stages.student.losses.across_tokenizers import AlignedRows
from stages.student.losses.logits import TeacherRows, next_token_loss
from stages.student.losses.vocabulary import sparse_cross_entropy
from stages.student.stage_config import Divergence

LOGITS_AT_ONCE = 2**26
"""Vocabulary logits that exist at a time: 441 rows of a vocabulary of 152,000, 134 MB in bfloat16."""

Head = Callable[[Tensor], Tensor]
"""Hidden states `[r, d]` to logits `[r, V]`, row by row."""


def answer_losses(
    head: Head,
    hidden_Rd: Tensor,
    answer_R: Tensor,
    teacher: TeacherRows | AlignedRows | None,
    divergence: Divergence = "forward",
    *,
    vocab_size: int,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> tuple[Tensor, Tensor | None]:
    """LM and logit distillation losses, both from one pass over the logits.

    Rows go through the head in parts of at most `logits_at_once` logits. The logits of the last part are kept for the
    gradient. All others are computed again in the backward pass, one part at a time, which costs one more product with
    the head's weight. Values and gradients are those of one pass over all rows.

    The head is only called, its weight is never read: it may be frozen, tied, quantised, or sharded and gathered when
    it is called. A head that is gathered by itself is gathered once for each part; ranks must then have equally many
    parts.

    The last hidden states, answer tokens and the teacher's distributions are those of the answer rows; without
    distillation there is no teacher. `logits_at_once` counts logits (rows times `vocab_size`); a part has at least one
    row. Divergences: `TeacherRows.loss`; they are not those of `AlignedRows`.

    Returns:
        `[R]` LM loss, `[R]` distillation loss or None.
    """
    size = max(1, logits_at_once // vocab_size)
    parts = []
    for start in range(0, max(len(hidden_Rd), 1), size):
        rows = slice(start, start + size)
        arguments = head, hidden_Rd[rows], answer_R[rows], None if teacher is None else teacher[rows], divergence
        if start + size >= len(hidden_Rd):
            parts.append(_row_losses(*arguments))
        else:
            parts.append(checkpoint(_row_losses, *arguments, use_reentrant=False, preserve_rng_state=False))
    lm, kd = zip(*parts, strict=True)
    return torch.cat(lm), None if teacher is None else torch.cat(kd)


def _row_losses(
    head: Head,
    hidden_Rd: Tensor,
    answer_R: Tensor,
    teacher: TeacherRows | AlignedRows | None,
    divergence: Divergence,
) -> tuple[Tensor, Tensor | None]:
    logits_RV = head(hidden_Rd)
    if teacher is None:
        return next_token_loss(logits_RV, answer_R), None
    if isinstance(teacher, AlignedRows):
        return next_token_loss(logits_RV, answer_R), teacher.loss(logits_RV)
    if divergence != "forward" or teacher.temperature != 1:
        return next_token_loss(logits_RV, answer_R), teacher.loss(logits_RV, divergence)
    # Both are cross entropies at temperature 1: one softmax serves them, and one gradient of the logits.
    ids_RA = torch.cat([answer_R[:, None], teacher.ids_RA], dim=1)
    weights_2RA = teacher.weights_RA.new_zeros(2, *ids_RA.shape)
    weights_2RA[0, :, 0] = 1
    weights_2RA[1, :, 1:] = teacher.weights_RA
    lm_R, kd_R = sparse_cross_entropy(logits_RV, ids_RA, weights_2RA)
    return lm_R, kd_R
