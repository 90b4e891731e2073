"""Which tokens make the words of a sample's answers, and from which rows a model says them."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from stages.student.data.batch import Batch

_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")


@dataclass(frozen=True)
class Word:
    """A word of an answer.

    Attributes:
        text: As the answer has it.
        rows_U: int64, the answer rows of its tokens: the positions that predict them.
    """

    text: str
    rows_U: Tensor


def answer_words(tokenizer: Any, batch: Batch) -> list[list[Word]]:
    """The words of all answers of each sample of a batch, in order; punctuation and end tokens are none.

    A token that holds parts of two words belongs to both.
    """
    found: list[list[Word]] = [[] for _ in batch.keys]
    answers = batch.answers
    for row, words in enumerate(found):
        chosen = answers.sequence_R == row
        positions_R, tokens = answers.position_R[chosen].cpu(), answers.token_R[chosen].tolist()
        for answer in _runs(positions_R.tolist()):
            words += _words(tokenizer, tokens[answer], positions_R[answer])
    return found


def chosen_rows(tokenizer: Any, batch: Batch, word: str | None) -> list[Tensor]:
    """Of each sample the answer rows of a word, in whatever case it is written; of all answers where none is named."""
    if word is None:
        sequence_R, position_R = batch.answers.sequence_R.cpu(), batch.answers.position_R.cpu()
        return [position_R[sequence_R == row] for row in range(len(batch.keys))]
    wanted = word.casefold()
    return [
        torch.unique(rows_of([one for one in words if one.text.casefold() == wanted]))
        for words in answer_words(tokenizer, batch)
    ]


def rows_of(words: Sequence[Word]) -> Tensor:
    """The rows of all the words, one after the other."""
    return torch.cat([torch.zeros(0, dtype=torch.long), *(word.rows_U for word in words)])


def _runs(positions: Sequence[int]) -> Iterator[slice]:
    """Answers of one conversation: their positions are consecutive."""
    starts = [n for n, (before, at) in enumerate(pairwise([-2, *positions])) if at != before + 1]
    yield from map(slice, starts, [*starts[1:], len(positions)])


def _words(tokenizer: Any, tokens: Sequence[int], positions_R: Tensor) -> Iterator[Word]:
    # A token alone may be no text, such as part of a character or a piece whose space only its neighbours show.
    texts = [
        tokenizer.decode(tokens[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for end in range(len(tokens) + 1)
    ]
    ends = [len(text.rstrip("\ufffd")) for text in texts]
    for match in _WORD.finditer(texts[-1]):
        rows = [n for n in range(len(tokens)) if ends[n] < match.end() and ends[n + 1] > match.start()]
        if rows:
            yield Word(match.group(), positions_R[rows])
