"""A microbatch: tokens, pixels and stored targets, made of streamed samples in the loader's workers.

Shape letters: B samples, T tokens, R answer rows of the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stages.answer_rows import AnswerRows, answer_rows
from stages.families.batch import batch_inputs, move_inputs
from stages.student.data.sample_reader import SampleReader
from storage.codecs.maps import EncodedMaps
from storage.streaming.stream import StreamedSample


@dataclass(frozen=True)
class Batch:
    """One microbatch.

    Attributes:
        keys: Sample keys, in order.
        inputs: What the model is called with: `input_ids` and `attention_mask` `[B, T]`, and the pixels.
        answers: Its answer rows.
        logits_RQ: The teacher's stored logits of these rows; empty for a student with another tokenizer.
        image_positions: Positions of the image tokens of each sample, empty for text alone.
        maps: The stored maps of each sample, None for text alone.
    """

    keys: tuple[str, ...]
    inputs: dict[str, Tensor]
    answers: AnswerRows
    logits_RQ: Tensor
    image_positions: tuple[Tensor, ...]
    maps: tuple[EncodedMaps | None, ...]

    @property
    def num_with_image(self) -> int:
        """Samples that enter the attention loss."""
        return sum(maps is not None for maps in self.maps)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Batch":
        """On the device, floating inputs in the model's precision; the targets keep theirs."""
        return replace(
            self,
            inputs=move_inputs(self.inputs, device, dtype),
            answers=self.answers.to(device),
            logits_RQ=self.logits_RQ.to(device, non_blocking=True),
            maps=tuple(None if maps is None else maps.to(device, non_blocking=True) for maps in self.maps),
        )


@dataclass(frozen=True)
class Collator:
    """Makes a `Batch` of streamed samples.

    Attributes:
        reader: How the student reads a sample.
    """

    reader: SampleReader

    def __call__(self, samples: Sequence[StreamedSample]) -> Batch:
        """Pads on the right; an empty list gives an empty batch, for a rank without a share of the last step."""
        reader = self.reader
        read = [reader(sample) for sample in samples]
        token_ids = [conversation.token_ids for conversation in read]
        pixels = [conversation.pixel_inputs for conversation in read]
        # The teacher's logits are over its own tokens.
        logits = [] if reader.max_length is not None else [sample.targets.logits_RQ for sample in samples]
        return Batch(
            keys=tuple(sample.key for sample in samples),
            inputs=batch_inputs(reader.input_family, reader.image_token_id, token_ids, pixels),
            answers=answer_rows(token_ids, [conversation.answer_mask for conversation in read]),
            logits_RQ=torch.cat(logits or [torch.zeros(0, 0, dtype=torch.uint8)]),
            image_positions=tuple(conversation.image_positions for conversation in read),
            maps=tuple(sample.maps for sample in samples),
        )
