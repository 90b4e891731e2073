"""From streamed samples to a batch, in the loader's workers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stages.conversations.answer_rows import answer_rows
from stages.families.batch import batch_inputs
from stages.student.data.alignment import ComparedRows
from stages.student.data.answer_targets import answer_targets
from stages.student.data.batch import Batch
from stages.student.data.sample_reader import SampleReader
from storage.streaming.stream import StreamedSample


@dataclass(frozen=True)
class Collator:
    """Makes a `Batch` of streamed samples."""

    reader: SampleReader

    def __call__(self, samples: Sequence[StreamedSample]) -> Batch:
        """Pads on the right; an empty list gives an empty batch, for a rank without a share of the last step."""
        reader = self.reader
        read = [reader(sample) for sample in samples]
        token_ids = [conversation.token_ids for conversation in read]
        pixels = [conversation.pixel_inputs for conversation in read]
        # The teacher's logits are over its own tokens.
        logits = [] if reader.reads_anew else [sample.targets.logits_RQ for sample in samples]
        compared, parts = None, [reader.compared_rows(*pair) for pair in zip(samples, read, strict=True)]
        num_rows = [int(conversation.answer_mask.sum()) for conversation in read]
        if found := [part for part in parts if part is not None]:
            logits = [sample.targets.logits_RQ[part.teacher_A] for sample, part in zip(samples, found, strict=True)]
            compared = ComparedRows.joined(found, num_rows)
        return Batch(
            keys=tuple(sample.key for sample in samples),
            inputs=batch_inputs(reader.input_family, reader.image_token_id, token_ids, pixels),
            answers=answer_rows(token_ids, [conversation.answer_mask for conversation in read]),
            logits_RQ=torch.cat(logits or [torch.zeros(0, 0, dtype=torch.uint8)]),
            image_positions=tuple(conversation.image_positions for conversation in read),
            maps=tuple(sample.maps for sample in samples),
            answer_targets=tuple(
                answer_targets(conversation, sample.targets.answer_attention_LaN)
                for conversation, sample in zip(read, samples, strict=True)
            ),
            cells=tuple(sample.targets.cells_X for sample in samples),
            compared=compared,
            num_uncompared=sum(count > 0 and not len(part) for count, part in zip(num_rows, found, strict=False)),
        )
