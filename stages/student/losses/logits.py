"""Logit distillation and next-token cross entropy, row by row.

The forward divergence is the loss of METHOD. The others compare buckets: each stored id is one, all other tokens
together are one more, with the teacher's stored tail mass and the student's probability of all that is not stored.

Shape letters: R answer rows, V vocabulary, K stored ids of a row, D its draws, J ids that have a weight.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stages.student.losses.vocabulary import sparse_cross_entropy, support_probabilities
from storage.codecs.answer_logits import AnswerLogits
from storage.codecs.levels import LOWEST_LOGPROB

Divergence = Literal["forward", "reverse", "symmetric", "jensen_shannon"]

LEAST_TEACHER_PROBABILITY = math.exp(LOWEST_LOGPROB)
"""What KL(q || p) takes for a p below it, which may be 0: ids that merely pad the student's vocabulary."""


def logit_distillation_loss(student_RV: Tensor, teacher_RV: Tensor, temperature: float = 1.0) -> Tensor:
    """L_kd: cross entropy of the student under the teacher's distribution, mean over answer rows.

    Args:
        student_RV: student logits at the rows that predict an answer token.
        teacher_RV: teacher logits of the same rows. A longer vocabulary with the same leading ids is cut to the
            student's and renormalised; a shorter one gives the student's further ids probability zero.
        temperature: divides the logits of both. Gradients shrink as its square; the loss is not scaled up for it.

    Source: METHOD, "Logit KD".
    """
    teacher_probs = (teacher_RV[:, : student_RV.shape[1]].float() / temperature).softmax(-1)
    student_logprobs = (student_RV.float() / temperature).log_softmax(-1)[:, : teacher_probs.shape[1]]
    return -(teacher_probs * student_logprobs).sum(-1).mean()


def stored_logit_distillation_loss(
    student_RV: Tensor, stored: AnswerLogits, temperature: float = 1.0, divergence: Divergence = "forward"
) -> Tensor:
    """`[R]` logit distillation from what is stored of the teacher.

    `forward` is the cross entropy under the teacher's whole distribution: stored ids exactly, all others by stored
    tail samples. It equals `logit_distillation_loss` row by row when the teacher's whole vocabulary is stored, to the
    rounding of the codec. Else loss and gradient equal it in expectation over the tail samples, with the variance that
    `AnswerLogitsCodec.encode` states: the gradient for a student that equals its teacher is zero in expectation, not
    row by row.

    The others see K + 1 buckets, p of the teacher and q of the student: `reverse` is KL(q || p) = sum q log(q / p),
    `symmetric` the mean of KL(p || q) and KL(q || p), `jensen_shannon` the mean of KL(p || m) and KL(q || m) with
    m = (p + q) / 2. They are zero where the buckets agree, row by row, and use no draws: what the student does inside
    the tail costs nothing, and each is a lower bound of the same divergence over the whole vocabulary, which it equals
    when that is stored.

    A vocabulary longer than the teacher's: the further ids have probability zero. A shorter one: kept ids past it are
    left out and the rest renormalised; so are draws past it, but the tail's stored mass stays whole, for its share
    past the student's end is not known. The expected forward gradient then has the dense one's direction, and (1 - s)
    of its length, where s is that share of the renormalised mass: nearly nothing for ids that merely pad the teacher's.

    Args:
        student_RV: student logits, any floating type; summed in float32 (float64 stays).
        stored: the teacher's decoded records of the same rows.
        temperature: 1 or one of the stored ones; divides the logits of both.
        divergence: see above.

    Raises:
        ValueError: for a temperature that was not stored.
    """
    return teacher_rows(stored, student_RV.shape[1], temperature).loss(student_RV, divergence)


def next_token_loss(student_RV: Tensor, answer_R: Tensor) -> Tensor:
    """`[R]` cross entropy of the answer tokens, in float32."""
    return sparse_cross_entropy(student_RV, answer_R[:, None], student_RV.new_ones((len(answer_R), 1)).float())


@dataclass(frozen=True)
class TeacherRows:
    """The teacher's distribution at a temperature, over the ids that a student's vocabulary has.

    Attributes:
        temperature: divides the logits of both.
        ids_RK: stored ids; may lie past the student's vocabulary, with probability 0.
        probs_RK: their probabilities.
        tail_R: probability of all other ids.
        ids_RJ, weights_RJ: stored and drawn ids inside the student's vocabulary, with the weights that make their cross
            entropy the whole one in expectation.
    """

    temperature: float
    ids_RK: Tensor
    probs_RK: Tensor
    tail_R: Tensor
    ids_RJ: Tensor
    weights_RJ: Tensor

    def __getitem__(self, rows: slice) -> "TeacherRows":
        tensors = (self.ids_RK, self.probs_RK, self.tail_R, self.ids_RJ, self.weights_RJ)
        return TeacherRows(self.temperature, *(tensor[rows] for tensor in tensors))

    def loss(self, student_RV: Tensor, divergence: Divergence) -> Tensor:
        """`[R]`, see `stored_logit_distillation_loss`."""
        if divergence == "forward":
            return sparse_cross_entropy(student_RV, self.ids_RJ, self.weights_RJ, self.temperature)
        kept_RK, rest_R = support_probabilities(student_RV, self.ids_RK, self.temperature)
        student_RQ = torch.cat([kept_RK, rest_R[:, None]], dim=1)
        teacher_RQ = torch.cat([self.probs_RK, self.tail_R[:, None]], dim=1).to(student_RQ.dtype)
        if divergence == "jensen_shannon":
            middle_RQ = (student_RQ + teacher_RQ) / 2
            return (_divergence(teacher_RQ, middle_RQ) + _divergence(student_RQ, middle_RQ)) / 2
        reverse_R = _divergence(student_RQ, teacher_RQ.clamp(min=LEAST_TEACHER_PROBABILITY))
        return reverse_R if divergence == "reverse" else (reverse_R + _divergence(teacher_RQ, student_RQ)) / 2


def teacher_rows(stored: AnswerLogits, vocab_size: int, temperature: float) -> TeacherRows:
    """Cuts stored records to a student's vocabulary and renormalises them.

    Raises:
        ValueError: for a temperature that was not stored.
    """
    kept_RK, tail_R, draws_RD = stored.probabilities(temperature)
    kept_RK = kept_RK * (stored.ids_RK < vocab_size)
    # A row of which the student knows no token at all has no loss, rather than a division by zero.
    total_R1 = (kept_RK.sum(-1) + tail_R)[:, None].clamp(min=torch.finfo(kept_RK.dtype).tiny)
    draws_RD = draws_RD * (stored.tail_ids_RD < vocab_size)
    return TeacherRows(
        temperature=temperature,
        ids_RK=stored.ids_RK,
        probs_RK=kept_RK / total_R1,
        tail_R=tail_R / total_R1[:, 0],
        ids_RJ=torch.cat([stored.ids_RK, stored.tail_ids_RD], dim=1).clamp(max=vocab_size - 1),
        weights_RJ=torch.cat([kept_RK, draws_RD], dim=1) / total_R1,
    )


def _divergence(of_RQ: Tensor, under_RQ: Tensor) -> Tensor:
    """`[R]` KL(of || under); an empty bucket of the first adds nothing, and logarithms stay finite."""
    of_log_RQ, under_log_RQ = (probs.clamp(min=torch.finfo(probs.dtype).tiny).log() for probs in (of_RQ, under_RQ))
    return (of_RQ * (of_log_RQ - under_log_RQ)).sum(-1)
