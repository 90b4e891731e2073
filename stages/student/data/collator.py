"""From streamed samples to a batch, in the loader's workers.

Shape letters: T tokens.
"""

from collections.abc import Sequence

import torch

from stages.families.batch import batch_inputs
from stages.student.data.batch import Batch
from stages.student.data.sample_reader import SampleReader
from storage.streaming.stream import StreamedSample


class Collator:
    """Streamed samples -> `Batch`; runs in the loader's workers.

    Args:
        read: how the student reads a sample.
    """

    def __init__(self, read: SampleReader) -> None:
        self.read = read

    def __call__(self, samples: Sequence[StreamedSample]) -> Batch:
        """Pads right; an empty list gives an empty batch (a rank without a share of the last step)."""
        read = [self.read(sample) for sample in samples]
        rows, positions, answers = [], [], []
        for row, sample in enumerate(read):
            answer_T = sample.answer_mask.nonzero()[:, 0]
            rows.append(torch.full_like(answer_T, row))
            positions.append(answer_T - 1)
            answers.append(sample.token_ids[answer_T])
        token_ids, pixels = [sample.token_ids for sample in read], [sample.pixels for sample in read]
        none = [torch.zeros(0, dtype=torch.long)]
        # Of tokens that are the student's own the teacher said nothing.
        logits = [] if self.read.encoder is not None else [sample.targets.logits_RQ for sample in samples]
        return Batch(
            keys=tuple(sample.key for sample in samples),
            inputs=batch_inputs(self.read.family, self.read.image_token_id, token_ids, pixels),
            row_index_R=torch.cat(rows or none),
            row_position_R=torch.cat(positions or none),
            answer_R=torch.cat(answers or none),
            logits_RQ=torch.cat(logits or [torch.zeros(0, 0, dtype=torch.uint8)]),
            image_positions=tuple(sample.image_positions for sample in read),
            maps=tuple(sample.maps for sample in samples),
        )
