"""Scores pairs of captions, by likelihood and by letter.

*Likelihood.* Each caption is the model's answer to one fixed prompt about the image. Its score is the sum of the
log-probabilities of its tokens, the end token included. The pair counts 1 if the fitting caption scores higher, 1/2 for
equal scores, else 0.

*Letters.* The prompt shows both captions as A and B and asks for the letter. A letter's score is its log-probability as
the answer's next token. Each pair is asked in both orders and counts the mean of the two: 1 where the fitting caption's
letter scores higher, 1/2 for equal scores, else 0. A model that always answers A has accuracy 1/2.

Scores are `[pairs, 2]`, for letters `[pairs, 2, 2]`; the last axis is (fitting caption, negative caption).
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from stages.conversations.answer_rows import answer_rows
from stages.conversations.encoder import ConversationEncoder, EncodedConversation
from stages.evaluation.caption_pairs import CaptionPair
from stages.evaluation.config import EvaluationConfig
from stages.evaluation.logprobs import RowReader
from stages.images import decode_image
from storage.errors import UserError
from storage.progress import SILENT, ProgressTask
from storage.regular_files import read_regular
from storage.samples.image_settings import ExifTurn
from storage.samples.members import MAX_MEMBER_BYTES

_NOT_SHOWN = SILENT.task("score")


@dataclass(frozen=True)
class LetterTokens:
    """The tokens after a prompt that begin the answers A and B."""

    lead: Tensor
    """int64: tokens that both answers begin with, such as one for a space; often empty."""
    letters: tuple[int, int]
    """The tokens in which the answers differ."""


def likelihood_scores(
    model: Any,
    encoder: ConversationEncoder,
    pairs: Sequence[CaptionPair],
    config: EvaluationConfig,
    task: ProgressTask = _NOT_SHOWN,
) -> Tensor:
    """Scores of both captions of each pair as answers to `config.prompt`.

    The model is in eval mode; the encoder's `max_length` is too large to cut a caption.

    Returns:
        `[pairs, 2]` float64: summed log-probability of the fitting and of the negative caption.

    Raises:
        UserError: If a pair cannot be encoded, or scores are not finite.
    """

    def encode(pair: CaptionPair, image: Image.Image) -> list[EncodedConversation]:
        captions = (pair.caption, pair.negative_caption)
        return [encoder.encode_pair(config.prompt, text, [image]) for text in captions]

    reader = RowReader(model)
    scores = []
    for groups in _encoded_batches(pairs, encode, config, task, encoder.image_settings.exif):
        items = [item for group in groups for item in group]
        rows = answer_rows([item.token_ids for item in items], [item.answer_mask for item in items])
        counts = [int(item.answer_mask.sum()) for item in items]
        hidden_Rd = reader.hidden(groups, torch.split(rows.position_R, counts))
        log_probs_R = reader.log_probs(hidden_Rd, rows.token_R[:, None])[:, 0].double()
        scores.append(torch.stack([part.sum() for part in torch.split(log_probs_R, counts)]).view(-1, 2))
    return _finite(torch.cat(scores), pairs)


def letter_scores(
    model: Any,
    encoder: ConversationEncoder,
    pairs: Sequence[CaptionPair],
    config: EvaluationConfig,
    task: ProgressTask = _NOT_SHOWN,
) -> Tensor:
    """Scores of the letters of both captions of each pair, in both orders.

    Model, encoder and errors are those of `likelihood_scores`.

    Returns:
        `[pairs, 2, 2]` float64: log-probability of the letter of the fitting and of the negative caption (last
        axis), where the fitting caption is A and where it is B (middle axis).
    """
    tokens = letter_tokens(encoder)

    def encode(pair: CaptionPair, image: Image.Image) -> list[EncodedConversation]:
        orders = [(pair.caption, pair.negative_caption), (pair.negative_caption, pair.caption)]
        prompts = [config.letter_prompt.format(a=a, b=b) for a, b in orders]
        return [_prompt(encoder, prompt, image, tokens) for prompt in prompts]

    reader = RowReader(model)
    scores = []
    for groups in _encoded_batches(pairs, encode, config, task, encoder.image_settings.exif):
        last_rows = [torch.tensor([len(item.token_ids) - 1]) for group in groups for item in group]
        letters_R2 = torch.tensor(tokens.letters).expand(len(last_rows), 2)
        by_letter = reader.log_probs(reader.hidden(groups, last_rows), letters_R2).double().view(-1, 2, 2)
        # Where the fitting caption is B, the letters come as (negative, fitting).
        scores.append(torch.stack([by_letter[:, 0], by_letter[:, 1].flip(-1)], dim=1))
    return _finite(torch.cat(scores), pairs)


def count_pairs(scores: Tensor) -> Tensor:
    """`[pairs]` float64: what each pair counts; ties count half."""
    fitting, negative = scores.unbind(-1)
    won = (fitting > negative).double() + 0.5 * (fitting == negative).double()
    return won.flatten(1).mean(1) if won.ndim > 1 else won


def share_of_first_letter(scores: Tensor) -> float:
    """How often A was preferred over both orders; a model that prefers neither letter has 1/2."""
    fitting_is_a, fitting_is_b = scores.unbind(1)
    chose_a = torch.cat([count_pairs(fitting_is_a), 1 - count_pairs(fitting_is_b)])
    return float(chose_a.mean())


def letter_tokens(encoder: ConversationEncoder) -> LetterTokens:
    """The tokens that tell answer A from answer B after a prompt.

    Raises:
        UserError: If the chat template does not put the answer right after its generation prompt.
    """
    prompt = encoder.encode_prompt("A or B?", []).token_ids.tolist()
    answers = [encoder.encode_pair("A or B?", letter, []).token_ids.tolist() for letter in "AB"]
    split = next((at for at, (a, b) in enumerate(zip(*answers, strict=False)) if a != b), 0)
    if split < len(prompt) or answers[0][: len(prompt)] != prompt:
        raise UserError(
            "the chat template's generation prompt is not what comes before an answer in it, so letters "
            "cannot be scored; use scoring 'likelihood'"
        )
    return LetterTokens(torch.tensor(answers[0][len(prompt) : split]), (answers[0][split], answers[1][split]))


def _prompt(encoder: ConversationEncoder, prompt: str, image: Image.Image, tokens: LetterTokens) -> EncodedConversation:
    encoded = encoder.encode_prompt(prompt, [image])
    token_ids = torch.cat([encoded.token_ids, tokens.lead.long()])
    return dataclasses.replace(encoded, token_ids=token_ids, answer_mask=torch.zeros_like(token_ids).bool())


def _encoded_batches(
    pairs: Sequence[CaptionPair],
    encode: Callable[[CaptionPair, Image.Image], list[EncodedConversation]],
    config: EvaluationConfig,
    task: ProgressTask,
    exif: ExifTurn,
) -> Iterator[list[list[EncodedConversation]]]:
    """Batches of encoded pairs; threads encode one batch ahead."""

    def encode_or_name(pair: CaptionPair) -> list[EncodedConversation]:
        where = f"pair {pair.key!r} of {pair.kind}, image {pair.image}"
        try:
            data = read_regular(pair.image, MAX_MEMBER_BYTES)
            encoded = encode(pair, decode_image(data, config.max_pixels, exif))
        except (UserError, OSError) as error:
            raise UserError(f"{where}: {error}") from error
        if (longest := max(len(item.token_ids) for item in encoded)) > config.max_length:
            raise UserError(f"{where}: {longest} tokens, max_length is {config.max_length}; raise it")
        return encoded

    pending: deque[Future[list[EncodedConversation]]] = deque()
    waiting = iter(pairs)
    with ThreadPoolExecutor(config.num_threads) as pool:
        for first in range(0, len(pairs), config.batch_size):
            room = 2 * config.batch_size - len(pending)
            pending += [pool.submit(encode_or_name, pair) for pair in islice(waiting, room)]
            num_ready = min(config.batch_size, len(pairs) - first)
            yield [pending.popleft().result() for _ in range(num_ready)]
            task.advance(num_ready)


def _finite(scores: Tensor, pairs: Sequence[CaptionPair]) -> Tensor:
    broken = ~scores.flatten(1).isfinite().all(1)
    if broken.any():
        pair = pairs[int(broken.nonzero()[0])]
        raise UserError(
            f"the model gives scores that are not finite for {int(broken.sum())} of {len(pairs)} pairs, "
            f"first pair {pair.key!r} of {pair.kind}; is the checkpoint damaged, or its dtype too narrow?"
        )
    return scores
