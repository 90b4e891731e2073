"""Turns a LLaVA conversation and its images into the tokens a model reads, and marks the answers in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from PIL import Image
from torch import Tensor

from stages.checkpoints.processor_sizes import check_picture
from stages.checkpoints.tokenizer_rules import panics_raised
from stages.conversations.answer_spans import mask_of_spans, render_with_answers
from stages.conversations.chat_templates import ChatTemplate
from stages.conversations.messages import to_messages, with_placeholders
from stages.conversations.template_process import Span
from stages.conversations.turns import parse_turns
from stages.unusable_sample import UnusableSample
from storage.errors import UserError
from storage.targets.manifest import Cut

_TEXT_KEYS: Final = frozenset(
    {
        "attention_mask",
        "input_ids",
        "mm_token_type_ids",
        "offset_mapping",
        "text_replacement_offsets",  # InternVL's processor makes an empty tensor of none
        "token_type_ids",
    }
)


@dataclass(frozen=True)
class EncodedConversation:
    """One conversation as a model reads it, without a batch dimension."""

    token_ids: Tensor
    """`[T]` int64, the image placeholder expanded to one token a feature."""
    answer_mask: Tensor
    """`[T]` bool: token t is part of an answer, the end token included; it is predicted at t-1."""
    pixel_inputs: dict[str, Tensor]
    """The image processor's outputs: `pixel_values`, for some families sizes too. Empty without images."""
    image_positions: Tensor
    """`[N]` int64, increasing: where `token_ids` holds the image token."""
    num_cut_tokens: int = 0
    """Tokens after these that were cut off."""
    num_cut_answer_tokens: int = 0
    """Of these, those of answers."""


class ConversationEncoder:
    """Encodes conversations for one processor; may be used by several threads.

    `image_token_id` is that of the model's config; of a conversation `max_length` tokens are kept at most, images'
    included. `cut` says where a longer one ends.

    Raises:
        UserError: If the tokenizer is slow or there is no usable chat template.
    """

    def __init__(self, processor: Any, image_token_id: int, max_length: int, cut: Cut = "whole_turns") -> None:
        if not processor.tokenizer.is_fast:
            raise UserError(
                f"{type(processor.tokenizer).__name__} is a slow tokenizer, which cannot tell the "
                "characters of a token; convert it to a fast one (tokenizer.json) first"
            )
        self.processor, self.image_token_id, self.max_length, self.cut = processor, image_token_id, max_length, cut
        self._image_token: str = processor.tokenizer.convert_ids_to_tokens(image_token_id)
        self._template = ChatTemplate(processor)
        # Undoes truncation and padding saved in tokenizer.json: a change of them while threads encode raises.
        processor.tokenizer("")

    def encode(self, conversations: Sequence[Mapping[str, str]], images: Sequence[Image.Image]) -> EncodedConversation:
        """The turns (`from`, `value`) of one sample as tokens, cut to `max_length` of them.

        `whole_turns` cuts behind the last answer that fits whole. `tokens` cuts anywhere behind the first answer
        token, as the reference trainer does. Neither cuts before or inside the image tokens.

        Text never becomes an image token; other special tokens written in it are read as such, as by the processor's
        own template.

        Raises:
            UnusableSample: If the conversation cannot be used; with the reason.
        """
        turns = parse_turns(conversations)
        if all(turn.role != "gpt" for turn in turns):
            raise UnusableSample("answer_missing", "no turn is from 'gpt'")
        text, spans = render_with_answers(self._template, to_messages(turns, len(images)))
        return self._truncate(self._tokenize(text, spans, images))

    def encode_pair(self, question: str, answer: str, images: Sequence[Image.Image]) -> EncodedConversation:
        """One question and its answer; images without a placeholder come before it."""
        asked = {"from": "human", "value": with_placeholders(question, len(images))}
        return self.encode([asked, {"from": "gpt", "value": answer}], images)

    def encode_prompt(
        self, question: str, images: Sequence[Image.Image], earlier: Sequence[Mapping[str, str]] = ()
    ) -> EncodedConversation:
        """A question up to where the model's answer begins; `answer_mask` is all False.

        Turns before it (`from`, `value`) hold the placeholders of all images, if there are any.

        Raises:
            UnusableSample: If the question cannot be asked, or is longer than `max_length`: a prompt is never cut.
        """
        last = {"from": "human", "value": question if earlier else with_placeholders(question, len(images))}
        messages = to_messages(parse_turns([*earlier, last]), len(images))
        encoded = self._tokenize(self._template.render(messages, add_generation_prompt=True), [], images)
        if len(encoded.token_ids) > self.max_length:
            found = f"{len(encoded.token_ids)} tokens, at most {self.max_length} fit; raise max_length"
            raise UnusableSample("prompt_beyond_max_length", found)
        return encoded

    def _tokenize(self, text: str, spans: list[Span], images: Sequence[Image.Image]) -> EncodedConversation:
        self._check_placeholders(text, len(images))
        for image in images:
            check_picture(self.processor, image)
        bos = self.processor.tokenizer.bos_token
        try:
            with panics_raised():
                outputs = self.processor(
                    text=[text],
                    images=[list(images)] if images else None,
                    add_special_tokens=not (bos and text.startswith(bos)),
                    return_offsets_mapping=True,
                    return_text_replacement_offsets=True,
                    return_tensors="pt",
                )
        except ValueError as error:
            raise UnusableSample("refused_by_processor", str(error)) from error
        token_ids = outputs["input_ids"][0]
        replacements = self._replacements(outputs) if images else []
        image_positions = (token_ids == self.image_token_id).nonzero()[:, 0]
        num_found, num_images = len(image_positions), len(images)
        num_expected = sum(replacement["replacement"].count(self._image_token) for replacement in replacements)
        if num_found != num_expected or len(replacements) != num_images:
            found = f"{num_found} image tokens where the processor expands {num_images} images to {num_expected}"
            raise UnusableSample("image_count_mismatch", found)
        answer_mask = mask_of_spans(spans, replacements, outputs["offset_mapping"][0])
        pixels = {key: value for key, value in outputs.items() if key not in _TEXT_KEYS and isinstance(value, Tensor)}
        return EncodedConversation(token_ids, answer_mask, pixels, image_positions)

    def _replacements(self, outputs: Mapping[str, Any]) -> list[dict[str, Any]]:
        try:
            return list(outputs["text_replacement_offsets"][0])
        except KeyError as error:
            raise UserError(
                f"{type(self.processor).__name__} does not report where it expands image placeholders "
                "(text_replacement_offsets); use a processor built on transformers' ProcessorMixin.__call__"
            ) from error

    def _check_placeholders(self, text: str, num_images: int) -> None:
        """Text of a turn may not smuggle in an image, nor the template leave one out."""
        token = getattr(self.processor, "image_token", None) or self._image_token
        if (count := text.count(token)) != num_images:
            found = f"the rendered conversation holds {token!r} {count} times for {num_images} images"
            raise UnusableSample("image_count_mismatch", f"{found}; the text of a turn must not contain it")

    def _truncate(self, encoded: EncodedConversation) -> EncodedConversation:
        num_tokens, limit, mask_T = len(encoded.token_ids), self.max_length, encoded.answer_mask
        last_image = int(encoded.image_positions[-1]) if len(encoded.image_positions) else -1
        if last_image >= limit:
            found = f"the last image token is number {last_image} from 0, max_length is {limit}"
            raise UnusableSample("image_beyond_max_length", found)
        if not bool(mask_T[:limit].any()) and (self.cut == "tokens" or num_tokens <= limit):
            found = f"no answer token among the first {limit} of {num_tokens} tokens"
            raise UnusableSample("no_answer_within_max_length", found)
        if num_tokens <= limit:
            return encoded
        if self.cut == "whole_turns":
            limit = _last_answer_end(mask_T, last_image + 1, limit)
        return replace(
            encoded,
            token_ids=encoded.token_ids[:limit].clone(),
            answer_mask=mask_T[:limit].clone(),
            num_cut_tokens=num_tokens - limit,
            num_cut_answer_tokens=int(mask_T[limit:].sum()),
        )


def _last_answer_end(mask_T: Tensor, first: int, limit: int) -> int:
    """Number of tokens up to the end of the last answer that ends at `first` or later and fits into `limit`.

    Answers are runs of True: between two of them there is always a question.

    Raises:
        UnusableSample: If no answer fits.
    """
    is_last_T = mask_T & ~torch.cat([mask_T[1:], mask_T.new_zeros(1)])
    ends = (is_last_T.nonzero()[:, 0] + 1).tolist()
    if fitting := [end for end in ends if first <= end <= limit]:
        return int(fitting[-1])
    behind = f" behind the last image, {first} tokens from the start," if first else ""
    found = f"no answer{behind} ends within max_length, {limit} tokens; answers end after {ends[:3]} tokens"
    raise UnusableSample("too_long", found)
