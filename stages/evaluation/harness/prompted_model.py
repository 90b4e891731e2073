"""A model that is prompted in batches: answers are generated, or given ones get log-probabilities."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import torch
from PIL import Image
from pydantic import Field
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin

from stages.checkpoints.image_settings import image_settings
from stages.conversations.answer_rows import answer_rows
from stages.conversations.encoder import NO_LIMIT, ConversationEncoder, EncodedConversation
from stages.conversations.encoding_ahead import batches_ahead
from stages.evaluation.harness.prompts import Prompt, load_image
from stages.images import MAX_PIXELS
from stages.student.model.generation import generation_settings
from stages.student.model.inputs import model_inputs
from stages.unusable_sample import UnusableSample
from storage.errors import UserError
from storage.samples.image_settings import DEFAULT_IMAGES, ImageConfig
from storage.strict_model import StrictModel


class DecodingConfig(StrictModel):
    """How answers are generated; by default the most likely token follows each other."""

    max_new_tokens: int = Field(default=1024, ge=1)
    """Tokens of the longest answer; fewer where the model's length leaves less room behind the prompt."""
    temperature: float = Field(default=0.0, ge=0)
    """Above 0 tokens are drawn, with PyTorch's generator of the process."""
    top_p: float | None = None
    """Draws come from the likeliest tokens of this total probability; only with a temperature."""
    top_k: int | None = None
    """Draws come from this many of the likeliest tokens; only with a temperature."""
    num_beams: int = Field(default=1, ge=1)
    """Beams of a beam search; 1 for none."""
    repetition_penalty: float = 1.0
    """Divides the scores of tokens that were there before; 1 changes nothing."""
    stop: tuple[str, ...] = ()
    """An answer ends before the first of these texts."""


class AnswerScore(NamedTuple):
    """How likely an answer is.

    Attributes:
        log_prob: Natural logarithm of its probability: the sum over its tokens, the end token included.
        is_greedy: Whether each of its tokens is the likeliest in its place.
    """

    log_prob: float
    is_greedy: bool


class PromptedModel:
    """Answers prompts with one model, `batch_size` prompts at a time.

    Pictures are read as the model's config says, or as `images` where it says nothing. Threads encode one batch ahead.
    The model is on its device and in eval mode.

    Raises:
        UserError: If the tokenizer is slow or there is no usable chat template.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        batch_size: int = 1,
        *,
        num_threads: int = 2,
        max_pixels: int = MAX_PIXELS,
        images: ImageConfig = DEFAULT_IMAGES,
    ) -> None:
        self.model, self.tokenizer, self.batch_size = model, processor.tokenizer, batch_size
        self._num_threads, self._max_pixels = num_threads, max_pixels
        reading = image_settings(model.config) or images
        self._encoder = ConversationEncoder(processor, model.config.image_token_id, NO_LIMIT, images=reading)
        self._room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or NO_LIMIT
        answered = self._encoder.encode_pair("What is this?", "This.", [])
        self._settings = generation_settings(model, self.tokenizer, answered, [])

    def generate(self, prompts: Iterable[Prompt], decoding: DecodingConfig) -> Iterator[str]:
        """The answer to each prompt, in their order, without white space around it.

        Raises:
            UserError: If a prompt cannot be asked, or is longer than the model reads; it is named.
        """
        for batch in batches_ahead(prompts, self._encode_prompt, self.batch_size, self._num_threads):
            yield from self._generate(batch, decoding)

    def scores(self, questions: Iterable[tuple[Prompt, Sequence[str]]]) -> Iterator[list[AnswerScore]]:
        """How likely each answer to each prompt is, in their order; a prompt holds no earlier answer.

        Raises:
            UserError: If an answer cannot be encoded with its prompt, or both are longer than the model reads; the
                prompt is named.
        """
        for (group,) in batches_ahead(questions, self._encode_answers, 1, self._num_threads):
            parts = (group[start : start + self.batch_size] for start in range(0, len(group), self.batch_size))
            yield [score for part in parts for score in self._scores(part)]

    def _encode_prompt(self, prompt: Prompt) -> EncodedConversation:
        with _named(prompt):
            *earlier, question = prompt.turns
            encoded = self._encoder.encode_prompt(question["value"], self._images(prompt), earlier)
            self._check_room(encoded, at_least=1)
        return encoded

    def _encode_answers(self, question: tuple[Prompt, Sequence[str]]) -> list[EncodedConversation]:
        prompt, answers = question
        assert all(turn["from"] != "assistant" for turn in prompt.turns)
        with _named(prompt):
            images = self._images(prompt)
            conversations = [[*prompt.turns, {"from": "gpt", "value": answer}] for answer in answers]
            group = [self._encoder.encode(turns, images) for turns in conversations]
            for encoded in group:
                self._check_room(encoded)
        return group

    def _images(self, prompt: Prompt) -> list[Image.Image]:
        exif = self._encoder.image_settings.exif
        return [load_image(source, self._max_pixels, exif) for source in prompt.images]

    def _check_room(self, encoded: EncodedConversation, at_least: int = 0) -> None:
        num_tokens = len(encoded.token_ids)
        if num_tokens + at_least > self._room:
            found = f"{num_tokens} tokens, and the model reads {self._room} with the answer"
            raise UnusableSample("prompt_beyond_max_length", f"{found}; leave such prompts out")

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[EncodedConversation], decoding: DecodingConfig) -> list[str]:
        texts = [""] * len(prompts)
        # Pixels of one shape join in any family, also in one that is not known here.
        numbers = sorted(range(len(prompts)), key=lambda number: prompts[number].pixel_shapes())
        for _, alike in groupby(numbers, key=lambda number: prompts[number].pixel_shapes()):
            together = list(alike)
            answers = self._generate_alike([prompts[number] for number in together], decoding)
            for number, answer in zip(together, answers, strict=True):
                texts[number] = answer
        return texts

    def _generate_alike(self, prompts: Sequence[EncodedConversation], decoding: DecodingConfig) -> list[str]:
        rooms = [self._room - len(prompt.token_ids) for prompt in prompts]
        inputs = model_inputs(self.model, prompts, pad_left=True)
        settings = self._generation_config(decoding, max(rooms))
        generate: Any = self.model.generate
        output = generate(**inputs, generation_config=settings, tokenizer=self.tokenizer if decoding.stop else None)
        rows = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [self._text(row[:room], decoding.stop) for row, room in zip(rows, rooms, strict=True)]

    def _generation_config(self, decoding: DecodingConfig, room: int) -> GenerationConfig:
        settings, draws = copy.deepcopy(self._settings), decoding.temperature > 0
        settings.update(
            max_new_tokens=min(decoding.max_new_tokens, room),
            do_sample=draws,
            temperature=decoding.temperature if draws else None,
            top_p=decoding.top_p if draws else None,
            top_k=decoding.top_k if draws else None,
            num_beams=decoding.num_beams,
            repetition_penalty=decoding.repetition_penalty,
            stop_strings=list(decoding.stop) or None,
        )
        return settings

    def _text(self, token_ids: list[int], stop: Sequence[str]) -> str:
        """The text up to an end token or a text that stops it: a row is padded behind it."""
        end = next((at for at, token in enumerate(token_ids) if token in self._settings.eos_token_id), None)
        text: str = self.tokenizer.decode(token_ids[:end], skip_special_tokens=True)
        return text[: min((at for word in stop if (at := text.find(word)) >= 0), default=None)].strip()

    @torch.inference_mode()
    def _scores(self, answers: Sequence[EncodedConversation]) -> list[AnswerScore]:
        """Of answers to one prompt: logits exist only from the first row on that predicts one of their tokens."""
        rows = answer_rows([answer.token_ids for answer in answers], [answer.answer_mask for answer in answers])
        inputs, first = model_inputs(self.model, answers), int(rows.position_R.min())
        num_rows = inputs["input_ids"].shape[1] - first
        logits_BTV = self.model(**inputs, logits_to_keep=num_rows, use_cache=False).logits
        logits_RV = logits_BTV[rows.sequence_R, rows.position_R - first].float().cpu()
        chosen_R = logits_RV.gather(1, rows.token_R[:, None])[:, 0]
        log_probs_R = (chosen_R - logits_RV.logsumexp(-1)).double()
        are_best_R = chosen_R >= logits_RV.amax(-1)
        counts = [int(answer.answer_mask.sum()) for answer in answers]
        parts = (torch.split(tensor_R, counts) for tensor_R in (log_probs_R, are_best_R))
        return [AnswerScore(float(part.sum()), bool(best.all())) for part, best in zip(*parts, strict=True)]


@contextmanager
def _named(prompt: Prompt) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{prompt.name}: {error}") from error
