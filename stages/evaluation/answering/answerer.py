"""Answers questions with a model: likelihoods of candidates, or text by greedy decoding."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Final

import torch
from PIL import Image
from torch import Tensor

from stages.checkpoints.image_settings import image_settings
from stages.conversations.encoder import NO_LIMIT, ConversationEncoder
from stages.conversations.encoding_ahead import encoded_ahead
from stages.evaluation.answering.config import AnsweringConfig
from stages.evaluation.answering.encoding import (
    AskedSequence,
    SequenceGroup,
    encode_group,
    frame_of_answers,
    rows_of,
)
from stages.evaluation.answering.prefix_model import PrefixModel, RunningSequences, SharedFront
from stages.evaluation.suites.pictures import SuitePicture
from stages.evaluation.suites.suite import Answer, Likelihood, Question
from stages.student.model.generation import generation_settings
from stages.student.model.inputs import model_inputs
from storage.errors import UserError
from storage.samples.image_settings import DEFAULT_IMAGES, ImageConfig

Numbered = Sequence[tuple[int, Question]]
_BATCHES_AHEAD: Final = 2


class Answerer:
    """A model in evaluation mode with its processor.

    Pictures are read as the model's config says, or as `images` where it says nothing. `blank` shows a grey picture of
    the same size in place of each.

    Attributes:
        notes: what the user should know, such as that this model's prefixes cannot be shared.

    Raises:
        UserError: If the model cannot be read row by row, or has no usable chat template.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        config: AnsweringConfig,
        images: ImageConfig = DEFAULT_IMAGES,
        *,
        blank: bool = False,
    ) -> None:
        self.model, self.processor, self.config = model.eval(), processor, config
        self.images, self.blank = image_settings(model.config) or images, blank
        self.encoder = ConversationEncoder(processor, model.config.image_token_id, NO_LIMIT, images=self.images)
        self.notes: list[str] = []
        self._num_lead, self._num_end = frame_of_answers(self.encoder)
        self._prefix_model = PrefixModel(model)
        self._check_model()

    @torch.inference_mode()
    def _check_model(self) -> None:
        small, wide = Image.new("RGB", (64, 48), "grey"), Image.new("RGB", (90, 30), "grey")
        trial = [
            [(0, Question("What is in the picture?", (), ("All is grey.", "All of it is red or blue.")))],
            [(1, Question("Is it grey? Answer by yes or no.", (), ("Yes",)))],
        ]
        groups = [
            encode_group(self.encoder, asked, [image], self._num_lead, self._num_end)
            for asked, image in zip(trial, (small, wide), strict=True)
        ]
        answered = groups[0].sequences[0].encoded
        self._settings = generation_settings(self.model, self.processor.tokenizer, answered, [])
        self._settings.update(do_sample=False, temperature=None, top_p=None, top_k=None, num_beams=1)
        self._settings.repetition_penalty = 1.0
        self._prefix_model.check_head(answered)
        alike = groups if groups[0].pixel_shapes() == groups[1].pixel_shapes() else groups[:1]
        self.shares_prefixes = self._prefix_model.reads_fronts_once(
            [front for group in alike for front in _fronts(group)]
        )
        if not self.shares_prefixes:
            name = type(self.model).__name__
            self.notes.append(f"{name} cannot go on from a shared prefix: every question is computed whole, slower")

    @torch.inference_mode()
    def answers(self, questions: Sequence[Question]) -> list[Answer]:
        """The answers to all questions, in their order; those about the same pictures side by side share work.

        Raises:
            UserError: If a picture cannot be read, a question cannot be encoded or is too long, or a likelihood is not
                finite.
        """
        found: dict[int, Answer] = {}
        for batch in self._encoded_batches(list(enumerate(questions))):
            for _, alike in groupby(batch, key=SequenceGroup.pixel_shapes):
                groups = list(alike)
                written = not bool(groups[0].sequences[0].encoded.answer_mask.any())
                found |= self._written(groups) if written else self._likelihoods(groups)
        return [found[number] for number in range(len(questions))]

    def _likelihoods(self, groups: Sequence[SequenceGroup]) -> dict[int, Answer]:
        sequences = [sequence for group in groups for sequence in group.sequences]
        if self.shares_prefixes:
            fronts = [front for group in groups for front in _fronts(group)]
            hidden = list(self._prefix_model.read(fronts).hidden_BTd)
            starts = [front.num_shared for front in fronts for _ in front.sequences]
        else:
            hidden = self._prefix_model.whole([sequence.encoded for sequence in sequences])
            starts = [0] * len(sequences)
        rows = [rows_of(sequence) for sequence in sequences]
        hidden_Rd = torch.cat(
            [one[at.to(one.device) - start] for one, start, (at, _) in zip(hidden, starts, rows, strict=True)]
        )
        log_probs_R = self._prefix_model.log_probs(hidden_Rd, torch.cat([ids for _, ids in rows])).double()
        if not bool(log_probs_R.isfinite().all()):
            raise UserError("the model gives scores that are not finite; is it damaged, or its dtype too narrow?")
        likelihoods: dict[int, tuple[Likelihood, ...]] = {}
        parts = torch.split(log_probs_R, [len(ids) for _, ids in rows])
        for sequence, log_probs_r in zip(sequences, parts, strict=True):
            likelihoods[sequence.question] = (
                *likelihoods.get(sequence.question, ()),
                _likelihood(log_probs_r, sequence.num_end_tokens),
            )
        return dict(likelihoods)

    def _written(self, groups: Sequence[SequenceGroup]) -> dict[int, Answer]:
        sequences = [sequence for group in groups for sequence in group.sequences]
        if self.shares_prefixes:
            fronts = [front for group in groups for front in _fronts(group)]
            lengths = [len(one.token_ids) - front.num_shared for front in fronts for one in front.sequences]
            limits = [sequence.max_new_tokens for sequence in sequences]
            tokens = self._greedy(self._prefix_model.read(fronts), lengths, limits)
        else:
            tokens = [self._generated(sequence) for sequence in sequences]
        decode = self.processor.tokenizer.decode
        return {
            sequence.question: decode(ids, skip_special_tokens=True).strip()
            for sequence, ids in zip(sequences, tokens, strict=True)
        }

    def _greedy(self, running: RunningSequences, lengths: Sequence[int], limits: Sequence[int]) -> list[list[int]]:
        """The most likely token after the other, up to an end token or each sequence's limit."""
        ends, written = set(self._settings.eos_token_id), [list[int]() for _ in lengths]
        last_Bd = torch.stack([one[length - 1] for one, length in zip(running.hidden_BTd, lengths, strict=True)])
        open_ = [limit > 0 for limit in limits]
        while any(open_):
            next_B = self._most_likely(last_Bd)
            for number, token in enumerate(next_B.tolist()):
                if open_[number]:
                    written[number].append(token)
                    open_[number] = token not in ends and len(written[number]) < limits[number]
            if any(open_):
                self._prefix_model.go_on(running, next_B[:, None], torch.ones_like(next_B)[:, None])
                last_Bd = running.hidden_BTd[:, 0]
        return written

    def _most_likely(self, hidden_Bd: Tensor) -> Tensor:
        logits_BV: Tensor = self._prefix_model.head(hidden_Bd)
        if not bool(logits_BV.isfinite().all()):
            raise UserError("the model gives scores that are not finite; is it damaged, or its dtype too narrow?")
        logits_BV[:, self._settings.suppress_tokens] = -torch.inf
        return logits_BV.argmax(-1)

    def _generated(self, sequence: AskedSequence) -> list[int]:
        inputs = model_inputs(self.model, [sequence.encoded])
        self._settings.max_new_tokens = sequence.max_new_tokens
        output = self.model.generate(**inputs, generation_config=self._settings)
        tokens: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
        return tokens

    def _encoded_batches(self, questions: Numbered) -> Iterator[list[SequenceGroup]]:
        """Groups about the same pictures, joined to batches; threads encode ahead."""

        def alike(numbered: tuple[int, Question]) -> tuple[object, ...]:
            return (numbered[1].pictures, bool(numbered[1].candidates))

        groups = [list(group) for _, group in groupby(questions, key=alike)]
        num_ahead = _BATCHES_AHEAD * self.config.batch_size
        batch: list[SequenceGroup] = []
        for group in encoded_ahead(groups, self._encode, num_ahead, self.config.num_threads):
            written = [not bool(one.sequences[0].encoded.answer_mask.any()) for one in (*batch[:1], group)]
            count = sum(len(one.sequences) for one in (*batch, group))
            if batch and (count > self.config.batch_size or len(set(written)) > 1):
                yield batch
                batch = []
            batch.append(group)
        if batch:
            yield batch

    def _encode(self, questions: Numbered) -> SequenceGroup:
        first = questions[0][1]
        try:
            images = [self._load(picture) for picture in first.pictures]
            group = encode_group(self.encoder, questions, images, self._num_lead, self._num_end)
        except (UserError, OSError) as error:
            shown = ", ".join(str(picture.source) for picture in first.pictures)
            raise UserError(f"question {first.prompt!r:.100} about {shown}: {error}") from error
        if (longest := max(len(one.encoded.token_ids) for one in group.sequences)) > self.config.max_length:
            found = f"question {first.prompt!r:.100}: {longest} tokens, max_length is {self.config.max_length}"
            raise UserError(f"{found}; raise evaluate.max_length")
        return group

    def _load(self, picture: SuitePicture) -> Image.Image:
        return picture.load(self.config.max_pixels, self.images.exif, blank=self.blank)


def _fronts(group: SequenceGroup) -> list[SharedFront]:
    """One for all sequences; where they cannot share, one each up to the row that predicts its answer."""
    if (num_shared := group.num_shared()) is not None:
        return [SharedFront([sequence.encoded for sequence in group.sequences], num_shared)]
    return [SharedFront([sequence.encoded], sequence.first_row) for sequence in group.sequences]


def _likelihood(log_probs_r: Tensor, num_end_tokens: int) -> Likelihood:
    num_tokens = len(log_probs_r) - num_end_tokens
    return Likelihood(float(log_probs_r[:num_tokens].sum()), num_tokens, float(log_probs_r[num_tokens:].sum()))
