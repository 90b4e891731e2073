"""Logit distillation and next-token cross entropy, row by row.

The forward divergence is the published loss. The others compare buckets: each stored id is one, and all other ids
together are one more, with the teacher's stored tail mass and the student's probability of all of them.

Shape letters: R answer rows, V vocabulary, K stored ids of a row, D tail samples of a row, A ids of a row that have a
weight, O outcomes of a row: its stored ids, and all other ids as one.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.student.losses.vocabulary import sparse_cross_entropy, support_probabilities
from stages.student.stage_config import Divergence
from storage.codecs.answer_logits import AnswerLogits
from storage.codecs.levels import LOWEST_LOGPROB

LEAST_TEACHER_PROBABILITY = math.exp(LOWEST_LOGPROB)
"""KL(q || p) clamps p to at least this; p is 0 for ids that only pad the student's vocabulary."""


def logit_distillation_loss(student_RV: Tensor, teacher_RV: Tensor, temperature: float = 1.0) -> Tensor:
    """L_kd: cross entropy of the student under the teacher's distribution, mean over answer rows.

    Args:
        student_RV: Student logits at the answer rows.
        teacher_RV: Teacher logits of the same rows. A longer vocabulary with the same leading ids is cut to the
            student's and renormalised; a shorter one gives the student's further ids probability zero.
        temperature: Divides the logits of both. Gradients shrink as its square; the loss is not scaled up.

    Source: docs/method.md#logit-distillation
    """
    teacher_probs = (teacher_RV[:, : student_RV.shape[1]].float() / temperature).softmax(-1)
    student_logprobs = (student_RV.float() / temperature).log_softmax(-1)[:, : teacher_probs.shape[1]]
    return -(teacher_probs * student_logprobs).sum(-1).mean()


def next_token_loss(student_RV: Tensor, answer_R: Tensor) -> Tensor:
    """`[R]` cross entropy of the answer tokens, in float32."""
    return sparse_cross_entropy(student_RV, answer_R[:, None], student_RV.new_ones((len(answer_R), 1)).float())


@dataclass(frozen=True)
class TeacherRows:
    """The teacher's distribution at a temperature, over the ids that a student's vocabulary has.

    Attributes:
        temperature: Divides the logits of both.
        ids_RK: Stored ids; may lie past the student's vocabulary, with probability 0.
        probs_RK: Their probabilities.
        tail_R: Probability of all other ids.
        ids_RA, weights_RA: Stored and tail-sample ids inside the student's vocabulary, with weights that make their
            cross entropy the whole one in expectation.
    """

    temperature: float
    ids_RK: Tensor
    probs_RK: Tensor
    tail_R: Tensor
    ids_RA: Tensor
    weights_RA: Tensor

    def __getitem__(self, rows: slice | Tensor) -> "TeacherRows":
        tensors = (self.ids_RK, self.probs_RK, self.tail_R, self.ids_RA, self.weights_RA)
        return TeacherRows(self.temperature, *(tensor[rows] for tensor in tensors))

    def loss(self, student_RV: Tensor, divergence: Divergence) -> Tensor:
        """`[R]` logit distillation from the stored logits of the teacher.

        `forward` is the cross entropy under the teacher's whole distribution: exact for stored ids, by tail samples for
        all others. If the teacher's whole vocabulary is stored, it equals `logit_distillation_loss` row by row, up to
        the codec's rounding. Otherwise loss and gradient equal it in expectation over the tail samples
        (`AnswerLogitsCodec.encode` states the variance). The gradient for a student that equals its teacher is zero in
        expectation, not row by row.

        The others compare K + 1 buckets, p of the teacher and q of the student. `reverse` is KL(q || p) = sum q log(q /
        p), `symmetric` the mean of KL(p || q) and KL(q || p), `jensen_shannon` the mean of KL(p || m) and KL(q || m)
        with m = (p + q) / 2. They are zero row by row where the buckets agree, and use no tail samples. Differences
        inside the tail cost nothing, so each is a lower bound of the same divergence over the whole vocabulary.

        Args:
            student_RV: Student logits, any floating type; summed in float32 (float64 stays).
            divergence: See above.
        """
        if divergence == "forward":
            return sparse_cross_entropy(student_RV, self.ids_RA, self.weights_RA, self.temperature)
        kept_RK, rest_R = support_probabilities(student_RV, self.ids_RK, self.temperature)
        student_RO = torch.cat([kept_RK, rest_R[:, None]], dim=1)
        teacher_RO = torch.cat([self.probs_RK, self.tail_R[:, None]], dim=1).to(student_RO.dtype)
        if divergence == "jensen_shannon":
            middle_RO = (student_RO + teacher_RO) / 2
            return (_divergence(teacher_RO, middle_RO) + _divergence(student_RO, middle_RO)) / 2
        reverse_R = _divergence(student_RO, teacher_RO.clamp(min=LEAST_TEACHER_PROBABILITY))
        return reverse_R if divergence == "reverse" else (reverse_R + _divergence(teacher_RO, student_RO)) / 2


def teacher_rows(stored: AnswerLogits, vocab_size: int, temperature: float) -> TeacherRows:
    """Cuts the teacher's stored logits to a student's vocabulary and renormalises them.

    If the student's vocabulary is longer than the teacher's, the further ids have probability zero. If it is shorter,
    stored ids past its end are left out and the rest is renormalised. Tail samples past its end are left out too, but
    the tail's mass stays whole, because its share s past the end is not known. The expected forward gradient then has
    the dense gradient's direction and (1 - s) of its length; s is nearly zero for ids that only pad the vocabulary.
    The temperature divides the logits of both.

    Raises:
        ValueError: If the temperature is neither 1 nor a stored one.
    """
    kept_RK, tail_R, sampled_RD = stored.probabilities(temperature)
    kept_RK = kept_RK * (stored.ids_RK < vocab_size)
    # A row without any token of the student's vocabulary gets no loss instead of a division by zero.
    total_R1 = (kept_RK.sum(-1) + tail_R)[:, None].clamp(min=torch.finfo(kept_RK.dtype).tiny)
    shares_RD = (tail_R / max(sampled_RD.shape[1], 1))[:, None] * (sampled_RD < vocab_size)
    return TeacherRows(
        temperature=temperature,
        ids_RK=stored.ids_RK,
        probs_RK=kept_RK / total_R1,
        tail_R=tail_R / total_R1[:, 0],
        ids_RA=torch.cat([stored.ids_RK, sampled_RD], dim=1).clamp(max=vocab_size - 1),
        weights_RA=torch.cat([kept_RK, shares_RD], dim=1) / total_R1,
    )


def _divergence(of_RO: Tensor, under_RO: Tensor) -> Tensor:
    """`[R]` KL(of || under); an empty bucket of the first adds nothing, and logarithms stay finite."""
    of_log_RO, under_log_RO = (probs.clamp(min=torch.finfo(probs.dtype).tiny).log() for probs in (of_RO, under_RO))
    return (of_RO * (of_log_RO - under_log_RO)).sum(-1)
