"""A conversation with a model about one image; answers come token by token, earlier turns stay."""

from collections.abc import Callable

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin, TextStreamer

from stages.checkpoints.image_settings import image_settings
from stages.conversations.encoder import NO_LIMIT, ConversationEncoder, EncodedConversation
from stages.conversations.turns import PLACEHOLDER
from stages.student.model.generation import generation_settings
from stages.student.model.inputs import model_inputs
from stages.unusable_sample import UnusableSample
from storage.samples.image_settings import DEFAULT_IMAGES

Write = Callable[[str], None]
"""Gets each piece of an answer as soon as it is made."""


class Chat:
    """A conversation about an image, with answers of at most `max_new_tokens`.

    Raises:
        UserError: If the processor has no chat template or a slow tokenizer, or image and answer do not fit into the
            model's length.
    """

    def __init__(
        self, model: PreTrainedModel, processor: ProcessorMixin, image: Image.Image, max_new_tokens: int
    ) -> None:
        self.model, self.processor, self.image = model, processor, image
        self._room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or NO_LIMIT
        self._max_new_tokens = max_new_tokens
        reading = image_settings(model.config) or DEFAULT_IMAGES
        self._encoder = ConversationEncoder(processor, model.config.image_token_id, NO_LIMIT, images=reading)
        self._check_room(self._encoder.encode_prompt("?", [image]))
        answered = self._encoder.encode_pair("What is this?", "This.", [image])
        self._settings = generation_settings(model, processor.tokenizer, answered, [])
        self._settings.update(
            max_new_tokens=max_new_tokens, do_sample=False, temperature=None, top_p=None, top_k=None, num_beams=1
        )
        self._turns: list[dict[str, str]] = []

    def ask(self, question: str, write: Write) -> str:
        """The answer of greedy decoding; `write` gets its pieces.

        Raises:
            UnusableSample: If the question cannot be asked, or the conversation is too long.
        """
        prompt = self._encoder.encode_prompt(question, [self.image], self._turns)
        self._check_room(prompt)
        inputs = model_inputs(self.model, [prompt])
        streamer = TextStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        # In place of printing.
        streamer.on_finalized_text = lambda text, stream_end=False: write(text)
        with torch.inference_mode():
            output = self.model.generate(**inputs, generation_config=self._settings, streamer=streamer)
        new_tokens = output[0, inputs["input_ids"].shape[1] :]
        answer: str = self.processor.tokenizer.decode(new_tokens, skip_special_tokens=True).strip()
        asked = question if self._turns or PLACEHOLDER in question else f"{PLACEHOLDER}\n{question}"
        self._turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        return answer

    def _check_room(self, prompt: EncodedConversation) -> None:
        num_tokens = len(prompt.token_ids)
        if num_tokens + self._max_new_tokens > self._room:
            raise UnusableSample(
                "prompt_beyond_max_length",
                f"image and conversation are {num_tokens} tokens, and --max-new-tokens is {self._max_new_tokens}; the "
                f"model reads {self._room} in all. Give a smaller --max-new-tokens, ask less, or begin anew",
            )
