"""Answer rows of a teacher and a student whose tokenizers differ: which can be compared, and which tokens are the same.

A row predicts the token behind a piece of text. Two rows can be compared where both have read the same bytes of the
same answer. The text of an answer is what its tokens spell, up to its end token.

Shape letters: A compared rows, S tokens that both have, V ids of the teacher.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from stages.conversations.answer_ends import answer_end
from stages.conversations.answer_rows import answer_sizes
from stages.student.data.token_names import TokenNames, token_names
from stages.student.losses.across_tokenizers import SPACINGS, SharedTokens


@dataclass(frozen=True)
class ComparedRows:
    """The pairs of answer rows that can be compared, of one sample or of a batch.

    Attributes:
        teacher_A: int64, which of the stored answer rows.
        student_A: int64, which of the student's.
        spacing_A: int64, number of the pair in `SPACINGS`: whose next token holds a space that the other's lacks.
    """

    teacher_A: Tensor
    student_A: Tensor
    spacing_A: Tensor

    @classmethod
    def joined(cls, parts: Sequence["ComparedRows"], num_rows: Sequence[int]) -> "ComparedRows":
        """Of a batch, whose logits are those of the pairs alone; each sample has so many of the student's rows."""
        starts = accumulate(num_rows, initial=0)
        student = [part.student_A + start for part, start in zip(parts, starts, strict=False)]
        none = torch.zeros(0, dtype=torch.long)
        student_A = torch.cat([none, *student])
        spacing_A = torch.cat([none, *(part.spacing_A for part in parts)])
        return cls(torch.arange(len(student_A)), student_A, spacing_A)

    def __len__(self) -> int:
        return len(self.student_A)

    def to(self, device: torch.device) -> "ComparedRows":
        """The same on a device."""
        return ComparedRows(*(tensor.to(device, non_blocking=True) for tensor in vars(self).values()))


@dataclass(frozen=True)
class TokenAlignment:
    """Compares the answers of two tokenizers; runs in the loader's workers."""

    teacher: TokenNames
    student: TokenNames

    @classmethod
    def of_processors(cls, *processors: tuple[Any, int, str]) -> "TokenAlignment":
        """From the teacher's and the student's processor, image token id and name for errors.

        Raises:
            UserError: As `token_names`.
        """
        return cls(
            *(
                token_names(processor.tokenizer.backend_tokenizer, answer_end(processor, image_token_id), whose)
                for processor, image_token_id, whose in processors
            )
        )

    def compared_rows(
        self, stored_T: Tensor, stored_mask_T: Tensor, read_T: Tensor, read_mask_T: Tensor
    ) -> ComparedRows:
        """Pairs the rows of a sample: stored token ids and answer mask, and those that the student reads.

        Answers are paired in their order. From where the texts of one differ, no row of it is paired; where they differ
        in their first byte, none is.
        """
        pairs: list[tuple[int, int, int]] = []
        first = [0, 0]
        sides = ((self.teacher, stored_T, stored_mask_T), (self.student, read_T, read_mask_T))
        for answers in zip(*(_answers(*side) for side in sides), strict=False):
            pairs += [(first[0] + t, first[1] + s, spacing) for t, s, spacing in _paired(*answers)]
            first = [start + len(answer) for start, answer in zip(first, answers, strict=True)]
        columns = torch.tensor(pairs, dtype=torch.long).view(-1, 3).unbind(1)
        return ComparedRows(*columns)

    def shared_tokens(self, teacher_vocab: int, student_vocab: int) -> SharedTokens:
        """The tokens that both have, with one map for each of `SPACINGS`.

        Where several ids of one side have the same name, its last one counts.

        Args:
            teacher_vocab: Ids that the stored logits are over.
            student_vocab: Ids that the student's logits are over.
        """
        ids = {name: number for number, name in enumerate(self.student[:student_vocab]) if name is not None}
        maps_V = []
        for ours, theirs in SPACINGS:
            named = [_respaced(name, ours, theirs) for name in self.teacher[:teacher_vocab]]
            found = [-1 if name is None else ids.get(name, -1) for name in named]
            maps_V.append(torch.tensor(found + [-1] * (teacher_vocab - len(found))))
        return SharedTokens.of_maps(maps_V)


def _respaced(name: bytes | str | None, ours: bytes, theirs: bytes) -> bytes | str | None:
    """The student's name of a teacher's token, which begins with `ours` where the student's begins with `theirs`."""
    if not isinstance(name, bytes):
        return name
    return theirs + name[len(ours) :] if name.startswith(ours) else None


def _answers(names: TokenNames, ids_T: Tensor, mask_T: Tensor) -> list[list[bytes | str | None]]:
    """The names of each answer's tokens."""
    parts = torch.split(ids_T[mask_T], list(answer_sizes(mask_T)))
    return [[names[number] if number < len(names) else None for number in part.tolist()] for part in parts if len(part)]


def _paired(teacher: Sequence[bytes | str | None], student: Sequence[bytes | str | None]) -> list[tuple[int, int, int]]:
    """Rows of one answer, and the number of the pair in `SPACINGS`."""
    (text, rows), (own_text, own_rows) = _boundaries(teacher), _boundaries(student)
    pairs: list[tuple[int, int, int]] = []
    if text[:1] != own_text[:1]:
        # Also the beginning is then that of two texts.
        return pairs
    for at in sorted(rows.keys() & own_rows.keys()):
        if text[:at] != own_text[:at]:
            break
        (row, space), (own_row, own_space) = rows[at], own_rows[at]
        spacing = (b"", b"") if space == own_space else (space, own_space)
        if spacing in SPACINGS:
            pairs.append((row, own_row, SPACINGS.index(spacing)))
    return pairs


def _boundaries(names: Sequence[bytes | str | None]) -> tuple[bytes, dict[int, tuple[int, bytes]]]:
    """The text without white space before it, and at which of its bytes tokens begin.

    Templates differ in the white space before an answer, so it is no part of the text. A token that begins in it
    counts as the first, unless another one begins right behind it.

    Returns:
        The text; for each such byte the row, and white space of the text's beginning that is still to be read there.
    """
    spelled = []
    for name in names:
        if not isinstance(name, bytes):
            break
        spelled.append(name)
    whole = b"".join(spelled)
    text = whole.lstrip()
    num_before = len(whole) - len(text)
    starts = accumulate(map(len, spelled), initial=0)
    # The row that predicts the end is one of them; behind an answer that was cut there is none.
    found = [(row, start) for row, start in enumerate(starts) if row < len(names)]
    return text, {max(start - num_before, 0): (row, whole[start:num_before]) for row, start in found}
