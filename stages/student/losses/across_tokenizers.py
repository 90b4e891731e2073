"""Logit distillation between two tokenizers, at answer rows where both have read the same text.

Shape letters: R answer rows, A of them that are compared, V vocabulary, K stored ids of a row, S tokens that both
tokenizers have.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from stages.student.losses.logits import TeacherRows
from stages.student.losses.vocabulary import sparse_cross_entropy, support_probabilities

SPACINGS: tuple[tuple[bytes, bytes], ...] = ((b"", b""), (b" ", b""), (b"", b" "))
"""What the next token of the teacher, and that of the student, begins with where the other one's does not. Only an
answer's first token can differ so: a template may write a space before it that the other's does not."""


def sorted_probability_loss(student_RV: Tensor, teacher: TeacherRows) -> Tensor:
    """`[R]` L1 distance between the probabilities of both, each sorted by size: the Universal Logit Distillation loss.

    Sorted probabilities say how sure a model is, and among how many tokens, not of which ones. The K largest of both
    are compared one by one, a shorter vocabulary padded with zeros, and all others as one sum: with m the teacher's and
    n the student's, |m - n| stands for what would be between |m - n| and m + n. So the loss is 0 for equal
    distributions, and is below that of whole vocabularies by at most 2 min(m, n), by nothing where the teacher's whole
    vocabulary is stored.

    Args:
        student_RV: Student logits of any floating type; their order is a constant in the gradient.
        teacher: The teacher's distributions at these rows.

    Source: docs/method.md#logits-across-tokenizers
    """
    num_kept = teacher.probs_RK.shape[1]
    ids_RA = student_RV.topk(min(num_kept, student_RV.shape[1]), dim=-1).indices
    probs_RA, rest_R = support_probabilities(student_RV, ids_RA, teacher.temperature)
    largest_RK = pad(probs_RA, (0, num_kept - ids_RA.shape[1]))
    # Rounded values may have lost the order of their ids.
    wanted_RK = teacher.probs_RK.to(probs_RA.dtype).sort(dim=-1, descending=True).values
    return (wanted_RK - largest_RK).abs().sum(-1) + (teacher.tail_R.to(rest_R.dtype) - rest_R).abs()


@dataclass(frozen=True)
class SharedTokens:
    """Tokens that both tokenizers have, for each of `SPACINGS`.

    Attributes:
        student_ids: `[S]` int64, the student's ids of these tokens, rising.
        places_V: `[V]` int64, which of them each of the teacher's ids is; -1 where it is none.
    """

    student_ids: tuple[Tensor, ...]
    places_V: tuple[Tensor, ...]

    @classmethod
    def of_maps(cls, maps_V: Sequence[Tensor]) -> "SharedTokens":
        """From the student's id of each of the teacher's ids, -1 where there is none."""
        ids = [torch.unique(map_V[map_V >= 0]) for map_V in maps_V]
        places = [
            torch.where(map_V >= 0, torch.searchsorted(ids_S, map_V), -1)
            for ids_S, map_V in zip(ids, maps_V, strict=True)
        ]
        return cls(tuple(ids), tuple(places))

    @property
    def num_shared(self) -> int:
        """The teacher's ids whose token both have, spaces included."""
        return int((self.places_V[0] >= 0).sum())

    def to(self, device: torch.device) -> "SharedTokens":
        """The same on a device."""
        return SharedTokens(*(tuple(one.to(device) for one in many) for many in (self.student_ids, self.places_V)))

    def loss(self, student_RV: Tensor, teacher: TeacherRows, spacing: int) -> Tensor:
        """`[R]` cross entropy over the shared tokens: -sum_s p(s) log(q(s) / q(shared)).

        p is the teacher's probability among all of its tokens, so that a row counts by what the teacher gives to shared
        ones; the student's is that among shared ones, so that nothing is said about all others. Where both tokenizers
        are the same it is the cross entropy of `TeacherRows.loss`. Tail samples of other tokens are left out: the loss
        and its gradient are right in expectation as there.

        Args:
            student_RV: Student logits, any floating type.
            teacher: The teacher's distributions at these rows.
            spacing: Number in `SPACINGS` of these rows.

        Source: docs/method.md#logits-across-tokenizers
        """
        ids_S, places_RA = self.student_ids[spacing], self.places_V[spacing][teacher.ids_RA]
        if not len(ids_S):
            return student_RV.new_zeros(len(student_RV)).float()
        weights_RA = teacher.weights_RA * (places_RA >= 0)
        shared_RS = student_RV.index_select(1, ids_S)
        return sparse_cross_entropy(shared_RS, places_RA.clamp(min=0), weights_RA, teacher.temperature)


@dataclass(frozen=True)
class AlignedRows:
    """The teacher at those of a student's answer rows that can be compared.

    Attributes:
        teacher: Its distributions there.
        spacing_A: Number in `SPACINGS` of each.
        number_R: Which of them each answer row has; -1 where it has none.
        shared: The tokens that both have; None compares sorted probabilities.
    """

    teacher: TeacherRows
    spacing_A: Tensor
    number_R: Tensor
    shared: SharedTokens | None

    def __getitem__(self, rows: slice) -> "AlignedRows":
        return replace(self, number_R=self.number_R[rows])

    def loss(self, student_RV: Tensor) -> Tensor:
        """`[R]` distillation loss; zero at rows that are not compared."""
        at_A = (self.number_R >= 0).nonzero()[:, 0]
        numbers_A = self.number_R[at_A]
        if self.shared is None:
            found_A = sorted_probability_loss(student_RV[at_A], self.teacher[numbers_A])
            return found_A.new_zeros(len(student_RV)).index_put((at_A,), found_A)
        loss_R = student_RV.new_zeros(len(student_RV), dtype=torch.promote_types(student_RV.dtype, torch.float32))
        for spacing in range(len(SPACINGS)):
            here = self.spacing_A[numbers_A] == spacing
            found = self.shared.loss(student_RV[at_A[here]], self.teacher[numbers_A[here]], spacing)
            loss_R = loss_R.index_put((at_A[here],), found.to(loss_R.dtype))
        return loss_R
