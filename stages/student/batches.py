"""From streamed samples to a batch on the device: tokens, pixels, stored targets.

Shape letters: B samples, T tokens, R answer rows of the batch, N image tokens, W windows, L captured layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import ProcessorMixin

from stages.attention import AttentionCapture
from stages.families import llava
from stages.families.batch import batch_inputs, pixels_of
from stages.families.family import Family
from stages.images import decode_image
from stages.student.matching import LayerMatching
from storage.codecs.windows import decode_windows as decode_stored
from storage.codecs.windows import estimate_windows, window_rows
from storage.errors import UserError
from storage.stream import StreamedSample
from storage.targets import MapTargets


@dataclass(frozen=True)
class Batch:
    """One microbatch.

    Attributes:
        keys: sample keys, in order.
        inputs: what the model is called with: `input_ids`, `attention_mask` `[B, T]`, and the pixels.
        row_index_R, row_position_R: batch row and token position that predict each answer token.
        answer_R: the answer tokens.
        logits_RB: the teacher's stored records of those rows.
        image_positions: positions of the image tokens of each sample, empty for text-only ones.
        maps: the stored maps of each sample, None for text-only ones.
    """

    keys: tuple[str, ...]
    inputs: dict[str, Tensor]
    row_index_R: Tensor
    row_position_R: Tensor
    answer_R: Tensor
    logits_RB: Tensor
    image_positions: tuple[Tensor, ...]
    maps: tuple[MapTargets | None, ...]

    @property
    def num_answer_rows(self) -> int:
        """R."""
        return len(self.answer_R)

    @property
    def num_with_image(self) -> int:
        """Samples that enter the attention loss."""
        return sum(maps is not None for maps in self.maps)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Batch":
        """On the device, floating inputs in the model's precision; the targets keep theirs."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        inputs = {name: move(t).to(dtype) if t.is_floating_point() else move(t) for name, t in self.inputs.items()}
        return replace(
            self,
            inputs=inputs,
            row_index_R=move(self.row_index_R),
            row_position_R=move(self.row_position_R),
            answer_R=move(self.answer_R),
            logits_RB=move(self.logits_RB),
        )


class Collator:
    """Streamed samples -> `Batch`; runs in the loader's workers.

    Args:
        processor: the teacher's; only its image half is used, the tokens are the stored ones.
        image_token_id: the placeholder's id.
        vocab_size: the student's; ids past it cannot be embedded.
        family: the teacher's.
    """

    def __init__(
        self, processor: ProcessorMixin, image_token_id: int, vocab_size: int, family: Family = llava.FAMILY
    ) -> None:
        self.processor = processor
        self.image_token_id = image_token_id
        # The student's decoder has plain positions and is not told where images are.
        self.family = replace(family, modality_input=None)
        self.vocab_size = vocab_size

    def __call__(self, samples: Sequence[StreamedSample]) -> Batch:
        """Pads right; an empty list gives an empty batch (a rank without a share of the last step)."""
        rows, positions, answers, image_positions = [], [], [], []
        for row, sample in enumerate(samples):
            ids = sample.targets.token_ids.long()
            is_image = ids == self.image_token_id
            self._check_ids(sample.key, ids[~is_image])
            answer_T = sample.targets.answer_mask.nonzero()[:, 0]
            rows.append(torch.full_like(answer_T, row))
            positions.append(answer_T - 1)
            answers.append(ids[answer_T])
            image_positions.append(is_image.nonzero()[:, 0])
        token_ids = [sample.targets.token_ids.long() for sample in samples]
        pixels = [pixels_of(self.family, self.processor, [decode_image(data) for data in s.images]) for s in samples]
        none = [torch.zeros(0, dtype=torch.long)]
        return Batch(
            keys=tuple(sample.key for sample in samples),
            inputs=batch_inputs(self.family, self.image_token_id, token_ids, pixels),
            row_index_R=torch.cat(rows or none),
            row_position_R=torch.cat(positions or none),
            answer_R=torch.cat(answers or none),
            logits_RB=torch.cat([s.targets.logits_RB for s in samples] or [torch.zeros(0, 0, dtype=torch.uint8)]),
            image_positions=tuple(image_positions),
            maps=tuple(sample.maps for sample in samples),
        )

    def _check_ids(self, key: str, ids: Tensor) -> None:
        if len(ids) and int(ids.max()) >= self.vocab_size:
            raise UserError(
                f"sample {key} holds token {int(ids.max())}, past the student's vocabulary of {self.vocab_size}; "
                "choose a student whose vocabulary holds every token of the data"
            )


@dataclass(frozen=True)
class WindowTargets:
    """The teacher's side of the attention loss for a batch, zero and False in the padding."""

    maps_WBNN: Tensor
    keep_WBNN: Tensor
    num_tokens_B: Tensor


def decode_windows(maps: Sequence[MapTargets | None], matching: LayerMatching, device: torch.device) -> WindowTargets:
    """Decodes stored maps on `device` and averages them into the windows.

    Args:
        maps: stored maps of each sample; None gives zeros.
        matching: windows, codec, and whether what is stored of windows belongs to these; where it does not, masks
            are made from the decoded maps and the exact thresholds.
        device: where to decode.

    Raises:
        ValueError: only some layers were read.
    """
    rows = window_rows(matching.captured_layers, matching.windows)
    counts = [0 if m is None else m.num_tokens for m in maps]
    width = max(counts, default=0)
    maps_WBNN = torch.zeros(len(matching.windows), len(maps), width, width, device=device)
    keep_WBNN = torch.zeros(maps_WBNN.shape, dtype=torch.bool, device=device)
    for row, stored in enumerate(maps):
        if stored is None:
            continue
        if stored.windows is None:
            raise ValueError("the maps were read without their windows; read all captured layers")
        n, decode = stored.num_tokens, decode_stored if matching.stored_masks else estimate_windows
        windows_WNN, keep_WNN = decode(matching.codec, rows, stored.maps.to(device), stored.windows.to(device), n)
        maps_WBNN[:, row, :n, :n] = windows_WNN
        keep_WBNN[:, row, :n, :n] = keep_WNN
    return WindowTargets(maps_WBNN, keep_WBNN, torch.tensor(counts, device=device))


def capture_for(batch: Batch, layers: Sequence[int], device: torch.device) -> AttentionCapture:
    """The student's side: which maps to take while it runs on `batch`."""
    return AttentionCapture(layers=frozenset(layers), positions=batch.image_positions).to(device)
