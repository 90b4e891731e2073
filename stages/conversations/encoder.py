"""Turns a LLaVA conversation and its images into the tokens a model reads, and marks the answers in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from stages.checkpoints.processor_sizes import check_picture
from stages.checkpoints.tokenizer_rules import panics_raised
from stages.conversations.answer_spans import expand_placeholders, mask_of_spans, render_with_answers, untrimmed
from stages.conversations.chat_templates import ChatTemplate
from stages.conversations.cuts import (
    StoredTurns,
    answer_runs,
    kept_length,
    num_placeholders,
    part_with_images,
    turns_until,
)
from stages.conversations.messages import Message, to_messages, with_placeholders
from stages.conversations.special_tokens import SpecialTokens
from stages.conversations.template_process import Span
from stages.conversations.turns import Turn, parse_turns
from stages.unusable_sample import UnusableSample
from storage.errors import UserError
from storage.samples.image_settings import DEFAULT_IMAGES, ImageConfig
from storage.targets.manifest import Cut

NO_LIMIT: Final = 2**31
"""As `max_length`: nothing is cut."""

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
    num_images: int = 0
    """Of the sample's images; these are the first."""
    num_cut_images: int = 0
    """Images after these, of turns that were cut off."""
    num_cut_tokens: int = 0
    """Tokens after these that were cut off."""
    num_cut_answer_tokens: int = 0
    """Of these, those of answers."""

    def pixel_shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Equal for those whose images join in one batch without padding; families that cut images in tiles differ."""
        return [(name, tuple(values.shape[1:])) for name, values in self.pixel_inputs.items()]


class RenderedConversation(NamedTuple):
    """What a chat template makes of a conversation.

    Attributes:
        text: With special tokens of the turns' texts broken.
        spans: Of the answers in it.
        any_broken: Whether it holds such a token.
    """

    text: str
    spans: list[Span]
    any_broken: bool


class ConversationEncoder:
    """Encodes conversations for one processor; may be used by several threads.

    `image_token_id` is that of the model's config; of a conversation `max_length` tokens are kept at most, images'
    included. `cut` says where a longer one ends, `images` where the only image of a conversation stands, and for
    callers how its bytes are decoded.

    Raises:
        UserError: If the tokenizer is slow or there is no usable chat template.
    """

    def __init__(
        self,
        processor: Any,
        image_token_id: int,
        max_length: int,
        *,
        cut: Cut = "whole_turns",
        images: ImageConfig = DEFAULT_IMAGES,
    ) -> None:
        if not processor.tokenizer.is_fast:
            raise UserError(
                f"{type(processor.tokenizer).__name__} is a slow tokenizer, which cannot tell the "
                "characters of a token; convert it to a fast one (tokenizer.json) first"
            )
        self.processor, self.image_token_id, self.max_length, self.cut = processor, image_token_id, max_length, cut
        self.image_settings = images
        self._image_token: str = processor.tokenizer.convert_ids_to_tokens(image_token_id)
        self._template = ChatTemplate(processor)
        self._placeholder: str = getattr(processor, "image_token", None) or self._image_token
        image_tokens = {self._placeholder, self._image_token}
        self._special_tokens = SpecialTokens(processor.tokenizer, self._template, image_tokens)
        self._untrimmed = untrimmed(processor.tokenizer.backend_tokenizer)
        # Undoes truncation and padding saved in tokenizer.json: a change of them while threads encode raises.
        processor.tokenizer("")

    def encode(self, conversations: StoredTurns, images: Sequence[Image.Image]) -> EncodedConversation:
        """The turns (`from`, `value`) of one sample as tokens, cut to `max_length` of them.

        `whole_turns` cuts behind the last answer that fits whole. `tokens` cuts anywhere behind the first answer
        token, as the reference trainer does. Neither cuts inside an image: a turn whose images do not fit is left out
        with all after it, and the conversation then ends with the last answer before that turn, or what fits of it.

        Special tokens written in a turn's text are read as text; an end token that ends an answer is not said twice.

        Raises:
            UnusableSample: If the conversation cannot be used; with the reason.
        """
        whole = self._tokenize(self.render(conversations, len(images)), images)
        length = kept_length(whole.answer_mask, whole.image_positions, self.max_length, self.cut)
        if length == len(whole.token_ids):
            return whole
        if bool((whole.image_positions >= length).any()):
            return self._without_later_turns(conversations, images, whole, length)
        return _first_tokens(whole, length)

    def render(self, conversations: StoredTurns, num_images: int) -> RenderedConversation:
        """The text of the turns; neither images nor the tokenizer are needed for it.

        Raises:
            UnusableSample: If there is none, or no answer in it; with the reason.
        """
        turns = parse_turns(conversations)
        if all(turn.role != "gpt" for turn in turns):
            raise UnusableSample("answer_missing", "no turn is from 'gpt'")
        for index, (role, text) in enumerate(turns):
            if role == "gpt" and self._special_tokens.is_end(text):
                raise UnusableSample("answer_missing", f"turn {index} (gpt) is nothing but an end token")
        messages, any_broken = self._messages(turns, num_images)
        text, spans = render_with_answers(self._template, messages)
        self._check_placeholders(text, num_images)
        return RenderedConversation(text, spans, any_broken)

    def encode_pair(self, question: str, answer: str, images: Sequence[Image.Image]) -> EncodedConversation:
        """One question and its answer; images without a placeholder come before it."""
        asked = {"from": "human", "value": with_placeholders(question, len(images))}
        return self.encode([asked, {"from": "gpt", "value": answer}], images)

    def encode_prompt(
        self, question: str, images: Sequence[Image.Image], earlier: StoredTurns = ()
    ) -> EncodedConversation:
        """A question up to where the model's answer begins; `answer_mask` is all False.

        Turns before it (`from`, `value`) hold the placeholders of all images, if there are any.

        Raises:
            UnusableSample: If the question cannot be asked, or is longer than `max_length`: a prompt is never cut.
        """
        last = {"from": "human", "value": question if earlier else with_placeholders(question, len(images))}
        messages, any_broken = self._messages(parse_turns([*earlier, last]), len(images))
        text = self._template.render(messages, add_generation_prompt=True)
        self._check_placeholders(text, len(images))
        encoded = self._tokenize(RenderedConversation(text, [], any_broken), images)
        if len(encoded.token_ids) > self.max_length:
            found = f"{len(encoded.token_ids)} tokens, at most {self.max_length} fit; raise max_length"
            raise UnusableSample("prompt_beyond_max_length", found)
        return encoded

    def _messages(self, turns: Sequence[Turn], num_images: int) -> tuple[list[Message], bool]:
        return self._special_tokens.guarded(to_messages(turns, num_images, self.image_settings.position))

    def _tokenize(self, rendered: RenderedConversation, images: Sequence[Image.Image]) -> EncodedConversation:
        text, spans, any_broken = rendered
        for image in images:
            check_picture(self.processor, image)
        bos = self.processor.tokenizer.bos_token
        add_special_tokens = not (bos and text.lstrip().startswith(bos))
        try:
            with panics_raised():
                outputs = self.processor(
                    text=[text],
                    images=[list(images)] if images else None,
                    add_special_tokens=add_special_tokens,
                    return_offsets_mapping=True,
                    return_text_replacement_offsets=True,
                    return_tensors="pt",
                )
            token_ids, offsets_T2 = outputs["input_ids"][0], outputs["offset_mapping"][0]
            replacements = self._replacements(outputs) if images else []
            expanded = expand_placeholders(text, replacements)
            with panics_raised():
                if any_broken:
                    token_ids, offsets_T2 = self._special_tokens.encode(expanded, add_special_tokens)
                elif self._untrimmed is not None:
                    offsets = self._untrimmed.encode(expanded, add_special_tokens=add_special_tokens).offsets
                    offsets_T2 = torch.tensor(offsets)
        except ValueError as error:
            raise UnusableSample("refused_by_processor", str(error)) from error
        image_positions = (token_ids == self.image_token_id).nonzero()[:, 0]
        num_found, num_images = len(image_positions), len(images)
        num_expected = sum(replacement["replacement"].count(self._image_token) for replacement in replacements)
        if num_found != num_expected or len(replacements) != num_images:
            found = f"{num_found} image tokens where the processor expands {num_images} images to {num_expected}"
            raise UnusableSample("image_count_mismatch", found)
        answer_mask = mask_of_spans(spans, replacements, offsets_T2)
        pixels = {key: value for key, value in outputs.items() if key not in _TEXT_KEYS and isinstance(value, Tensor)}
        return EncodedConversation(token_ids, answer_mask, pixels, image_positions, num_images)

    def _replacements(self, outputs: Mapping[str, Any]) -> list[dict[str, Any]]:
        try:
            return list(outputs["text_replacement_offsets"][0])
        except KeyError as error:
            raise UserError(
                f"{type(self.processor).__name__} does not report where it expands image placeholders "
                "(text_replacement_offsets); use a processor built on transformers' ProcessorMixin.__call__"
            ) from error

    def _check_placeholders(self, text: str, num_images: int) -> None:
        """The template may not leave an image out, nor text become one on its way through it."""
        if (count := text.count(self._placeholder)) != num_images:
            found = f"the rendered conversation holds {self._placeholder!r} {count} times for {num_images} images"
            raise UnusableSample("image_count_mismatch", f"{found}; the chat template must write it once for each")

    def _without_later_turns(
        self, turns: StoredTurns, images: Sequence[Image.Image], whole: EncodedConversation, length: int
    ) -> EncodedConversation:
        """The turns up to the last answer that begins among the first `length` tokens, with the images of these only.

        They are encoded anew as a conversation that ends there: processors choose the pixels and tokens of an image by
        how many there are.
        """
        answers = [(start, end) for start, end in answer_runs(whole.answer_mask) if start < length]
        part = turns_until(turns, len(answers))
        if len(part) < len(turns):
            read = self.encode(part, images[: num_placeholders(part)])
            kept = _first_tokens(read, answer_runs(read.answer_mask)[-1][1])
            lost = read.num_cut_answer_tokens + int(whole.answer_mask[answers[-1][1] :].sum())
            # Whoever reads the sample later finds out its images in this way.
            if part_with_images(turns, len(images), kept.answer_mask, lost)[1] == kept.num_images:
                return replace(
                    kept,
                    num_cut_images=len(images) - kept.num_images,
                    num_cut_tokens=len(whole.token_ids) - len(kept.token_ids),
                    num_cut_answer_tokens=lost,
                )
        last = int(whole.image_positions[-1])
        found = f"the last image token is number {last} from 0, max_length is {self.max_length}"
        why = "its turn cannot be left out, because not every turn has an answer in the rendered conversation"
        raise UnusableSample("image_beyond_max_length", f"{found}; {why}")


def _first_tokens(encoded: EncodedConversation, length: int) -> EncodedConversation:
    """As many tokens; all images must be among them."""
    lost_T = encoded.answer_mask[length:]
    return replace(
        encoded,
        token_ids=encoded.token_ids[:length].clone(),
        answer_mask=encoded.answer_mask[:length].clone(),
        num_cut_tokens=len(lost_T),
        num_cut_answer_tokens=int(lost_T.sum()),
    )
