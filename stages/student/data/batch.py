"""A microbatch: tokens, pixels and stored targets."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stages.conversations.answer_rows import AnswerRows
from stages.families.batch import move_inputs
from stages.student.data.alignment import ComparedRows
from stages.student.data.answer_targets import AnswerTargets
from storage.codecs.attention_maps import EncodedMaps


@dataclass(frozen=True)
class Batch:
    """One microbatch.

    Attributes:
        keys: Sample keys, in order.
        inputs: What the model is called with: `input_ids` and `attention_mask` `[B, T]`, and the pixels.
        answers: Its answer rows.
        logits_RQ: The teacher's stored logits of these rows; for a student with another tokenizer those that are
            compared, or none.
        image_positions: Positions of the image tokens of each sample, empty for text alone.
        maps: The stored maps of each sample, None for text alone.
        cells: The cell of each image token of a sample whose maps are of cells; None elsewhere, on the CPU.
        answer_targets: The answers of each sample whose attention is learnt; None for one without any.
        compared: Which answer rows the logits are of; None where each row has its own, or none has.
        num_uncompared: Samples with answer rows, none of which is compared.
    """

    keys: tuple[str, ...]
    inputs: dict[str, Tensor]
    answers: AnswerRows
    logits_RQ: Tensor
    image_positions: tuple[Tensor, ...]
    maps: tuple[EncodedMaps | None, ...]
    answer_targets: tuple[AnswerTargets | None, ...] = ()
    compared: ComparedRows | None = None
    num_uncompared: int = 0
    cells: tuple[Tensor | None, ...] | None = None

    @property
    def num_answers(self) -> int:
        """Answers that enter the loss on answer attention."""
        return sum(len(one.sizes) for one in self.answer_targets if one is not None)

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
            answer_targets=tuple(None if one is None else one.to(device) for one in self.answer_targets),
            compared=None if self.compared is None else self.compared.to(device),
        )
