"""Questions about the same pictures as token sequences; threads decode and tokenize while the model works."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from PIL import Image

from stages.conversations.encoder import ConversationEncoder, EncodedConversation
from stages.evaluation.suites.suite import Question
from storage.errors import UserError


@dataclass(frozen=True)
class AskedSequence:
    """A prompt, alone or with one candidate answer behind it.

    Attributes:
        question: number of the question it belongs to.
        encoded: its tokens; `answer_mask` marks the candidate, its end token included.
        num_end_tokens: those of the candidate's tokens that end it.
        max_new_tokens: tokens to write at most where there is no candidate.
    """

    question: int
    encoded: EncodedConversation
    num_end_tokens: int = 0
    max_new_tokens: int = 0

    @property
    def first_row(self) -> int:
        """The position that predicts the answer's first token."""
        mask_T = self.encoded.answer_mask
        return (int(mask_T.nonzero()[0]) if bool(mask_T.any()) else len(mask_T)) - 1


@dataclass(frozen=True)
class SequenceGroup:
    """Sequences about the same pictures; all have candidates, or none has."""

    sequences: tuple[AskedSequence, ...]

    def num_shared(self) -> int | None:
        """How many tokens at the front all have in common, image tokens among them, each answer's first row behind.

        None if an image token is not among them, as where the template puts pictures behind the question.
        """
        first, *others = (sequence.encoded.token_ids for sequence in self.sequences)
        count = min(sequence.first_row for sequence in self.sequences)
        for token_ids in others:
            differs = (token_ids[:count] != first[:count]).nonzero()
            count = int(differs[0]) if len(differs) else count
        positions = self.sequences[0].encoded.image_positions
        return count if count and (not len(positions) or int(positions[-1]) < count) else None

    def pixel_shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Equal for groups whose images join in one batch without padding."""
        return self.sequences[0].encoded.pixel_shapes()


def encode_group(
    encoder: ConversationEncoder,
    questions: Sequence[tuple[int, Question]],
    images: Sequence[Image.Image],
    num_lead: int,
    num_end: int,
) -> SequenceGroup:
    """The sequences of numbered questions about the same images.

    `num_lead` and `num_end` are those of `frame_of_answers`.

    Raises:
        UnusableSample: If a question cannot be encoded.
        UserError: If first tokens are wanted that the tokenizer has not, or to be compared that are the same.
    """
    check_words(encoder.processor.tokenizer, (question for _, question in questions))
    sequences: list[AskedSequence] = []
    for number, question in questions:
        if not question.candidates:
            prompt = encoder.encode_prompt(question.prompt, images)
            sequences.append(AskedSequence(number, prompt, max_new_tokens=question.max_new_tokens))
        for candidate in question.candidates:
            encoded = encoder.encode_pair(question.prompt, candidate, images)
            if question.first_token_only:
                sequences.append(AskedSequence(number, _up_to_first_own_token(encoded, num_lead)))
            else:
                sequences.append(AskedSequence(number, encoded, num_end))
        if question.first_token_only:
            _check_told_apart(question, sequences[-len(question.candidates) :])
    return SequenceGroup(tuple(sequences))


def _check_told_apart(question: Question, sequences: Sequence[AskedSequence]) -> None:
    if len({int(sequence.encoded.token_ids[-1]) for sequence in sequences}) < len(sequences):
        names = " and ".join(map(repr, question.candidates))
        raise UserError(
            f"the tokenizer begins {names} with the same token, so the first token does not tell them apart; "
            "ask by --protocol generate"
        )


def _up_to_first_own_token(encoded: EncodedConversation, num_lead: int) -> EncodedConversation:
    """Ends with the answer's first token behind the lead, which alone counts as answer."""
    last = int(encoded.answer_mask.nonzero()[0]) + num_lead
    mask_T = torch.zeros(last + 1, dtype=torch.bool)
    mask_T[last] = True
    return replace(encoded, token_ids=encoded.token_ids[: last + 1], answer_mask=mask_T)


def frame_of_answers(encoder: ConversationEncoder) -> tuple[int, int]:
    """How many tokens every answer begins and ends with: mostly none for a blank, and one for the end.

    Raises:
        UserError: If the tokenizer has no two words, so that this cannot be told.
    """
    words = list(islice(_words(encoder.processor.tokenizer), 2))
    if len(words) < 2:
        raise UserError("the tokenizer has no two words, so ends of answers cannot be told; is its vocabulary whole?")
    answers = [encoder.encode_pair("Is it?", word, []) for word in words]
    first, second = (encoded.token_ids[encoded.answer_mask].tolist() for encoded in answers)
    return _num_alike(first, second), _num_alike(first[::-1], second[::-1])


def _words(tokenizer: Any) -> Iterator[str]:
    """Words that the tokenizer has, which begin and end with tokens of their own; "Yes" and "No" where it has them."""
    yes_no = ("Yes", "No")
    if not any(unknown_words(tokenizer, [word]) for word in yes_no):
        yield from yes_no
    for token in sorted(set(tokenizer.get_vocab().values()) - tokenizer.added_tokens_decoder.keys()):
        word = tokenizer.decode([token]).strip()
        if word.isalpha() and tokenizer(word, add_special_tokens=False).input_ids == [token]:
            yield word


def unknown_words(tokenizer: Any, words: Iterable[str]) -> list[str]:
    """Those of the words that the tokenizer has only as its unknown token, in part or whole."""
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return []
    return [word for word in words if unknown in tokenizer(word, add_special_tokens=False).input_ids]


def check_words(tokenizer: Any, questions: Iterable[Question]) -> None:
    """Checks that the tokenizer has the answers whose first tokens are wanted.

    Raises:
        UserError: If it has not: the probability would be that of any word it does not know.
    """
    words = dict.fromkeys(word for one in questions if one.first_token_only for word in one.candidates)
    if unknown := unknown_words(tokenizer, words):
        names = " and ".join(map(repr, unknown))
        raise UserError(
            f"the tokenizer does not have {names}: its probability would be that of any unknown word; ask by another "
            "--protocol, such as likelihood or generate, where the suite takes it"
        )


def _num_alike(first: Sequence[int], second: Sequence[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)


def rows_of(sequence: AskedSequence) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions that predict the candidate's tokens, and these tokens; int64, of equal length."""
    at = sequence.encoded.answer_mask.nonzero()[:, 0]
    return at - 1, sequence.encoded.token_ids[at].long()
