"""From streamed samples to a batch on the device: tokens, pixels, stored targets.

Shape letters: B samples, T tokens, R answer rows of the batch, N image tokens, W windows, L captured layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import ProcessorMixin

from stages.attention import AttentionCapture
from stages.images import decode_image
from stages.layers import window_means
from stages.student.matching import LayerMatching
from storage.codecs.answer_logits import AnswerLogits
from storage.codecs.maps import decode_maps
from storage.codecs.sinks import sink_keep_mask, unpack_mask
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
        logits: the teacher's stored log-probabilities of those rows.
        image_positions: positions of the image tokens of each sample, empty for text-only ones.
        maps: the stored maps of each sample, None for text-only ones.
    """

    keys: tuple[str, ...]
    inputs: dict[str, Tensor]
    row_index_R: Tensor
    row_position_R: Tensor
    answer_R: Tensor
    logits: AnswerLogits
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
            logits=self.logits.to(device),
        )


class Collator:
    """Streamed samples -> `Batch`; runs in the loader's workers.

    Args:
        processor: the teacher's; only its image half is used, the tokens are the stored ones.
        image_token_id: the placeholder's id.
        vocab_size: the student's; ids past it cannot be embedded.
    """

    def __init__(self, processor: ProcessorMixin, image_token_id: int, vocab_size: int) -> None:
        self.image_processor = processor.image_processor
        self.image_token_id = image_token_id
        self.vocab_size = vocab_size

    def __call__(self, samples: Sequence[StreamedSample]) -> Batch:
        """Pads right; an empty list gives an empty batch (a rank without a share of the last step)."""
        width = max((len(s.targets.token_ids) for s in samples), default=1)
        input_ids = torch.zeros(len(samples), width, dtype=torch.long)
        attention_mask = torch.zeros(len(samples), width, dtype=torch.long)
        rows, positions, answers, image_positions = [], [], [], []
        for row, sample in enumerate(samples):
            ids = sample.targets.token_ids.long()
            is_image = ids == self.image_token_id
            self._check_ids(sample.key, ids[~is_image])
            input_ids[row, : len(ids)] = ids
            attention_mask[row, : len(ids)] = 1
            answer_T = sample.targets.answer_mask.nonzero()[:, 0]
            rows.append(torch.full_like(answer_T, row))
            positions.append(answer_T - 1)
            answers.append(ids[answer_T])
            image_positions.append(is_image.nonzero()[:, 0])
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        images = [decode_image(data) for sample in samples for data in sample.images]
        if images:
            inputs["pixel_values"] = self.image_processor(images=images, return_tensors="pt")["pixel_values"]
        none = [torch.zeros(0, dtype=torch.long)]
        return Batch(
            keys=tuple(sample.key for sample in samples),
            inputs=inputs,
            row_index_R=torch.cat(rows or none),
            row_position_R=torch.cat(positions or none),
            answer_R=torch.cat(answers or none),
            logits=AnswerLogits.cat([sample.targets.logits for sample in samples]),
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
        matching: windows, codec, and whether the stored sink masks belong to these windows; where they do not, masks
            are made from the decoded maps.
        device: where to decode.
    """
    counts = [0 if m is None else m.num_tokens for m in maps]
    width = max(counts, default=0)
    maps_WBNN = torch.zeros(len(matching.windows), len(maps), width, width, device=device)
    keep_WBNN = torch.zeros(maps_WBNN.shape, dtype=torch.bool, device=device)
    for row, stored in enumerate(maps):
        if stored is None:
            continue
        n = stored.num_tokens
        decoded_LNN = decode_maps(matching.codec, stored.codes_LE.to(device), stored.caps_L.to(device), n)
        windows_WNN = window_means(decoded_LNN, matching.captured_layers, matching.windows)
        maps_WBNN[:, row, :n, :n] = windows_WNN
        if matching.stored_masks:
            keep_WBNN[:, row, :n, :n] = unpack_mask(stored.keep_masks.to(device), n, matching.codec.causal)
        else:
            keep_WBNN[:, row, :n, :n] = sink_keep_mask(windows_WNN)
    return WindowTargets(maps_WBNN, keep_WBNN, torch.tensor(counts, device=device))


def capture_for(batch: Batch, layers: Sequence[int], device: torch.device) -> AttentionCapture:
    """The student's side: which maps to take while it runs on `batch`."""
    return AttentionCapture(layers=frozenset(layers), positions=batch.image_positions).to(device)
