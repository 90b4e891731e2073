"""A microbatch on the device: tokens, pixels, stored targets, and these decoded.

Shape letters: B samples, T tokens, R answer rows of the batch, N image tokens, W windows, L captured layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stages.attention import AttentionCapture
from stages.student.layer_matching import LayerMatching
from storage.codecs.maps import EncodedMaps, MapCodec
from storage.codecs.windows import window_rows


@dataclass(frozen=True)
class Batch:
    """One microbatch.

    Attributes:
        keys: sample keys, in order.
        inputs: what the model is called with: `input_ids`, `attention_mask` `[B, T]`, and the pixels.
        row_index_R, row_position_R: batch row and token position that predict each answer token.
        answer_R: the answer tokens.
        logits_RQ: the teacher's stored records of those rows.
        image_positions: positions of the image tokens of each sample, empty for text-only ones.
        maps: the stored maps of each sample, None for text-only ones.
    """

    keys: tuple[str, ...]
    inputs: dict[str, Tensor]
    row_index_R: Tensor
    row_position_R: Tensor
    answer_R: Tensor
    logits_RQ: Tensor
    image_positions: tuple[Tensor, ...]
    maps: tuple[EncodedMaps | None, ...]

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
            logits_RQ=move(self.logits_RQ),
            maps=tuple(None if maps is None else maps.to(device, non_blocking=True) for maps in self.maps),
        )


@dataclass(frozen=True)
class WindowTargets:
    """The teacher's side of the attention loss for a batch, zero and False in the padding."""

    maps_WBNN: Tensor
    keep_WBNN: Tensor
    num_tokens_B: Tensor


def decode_windows(
    maps: Sequence[EncodedMaps | None], matching: LayerMatching, device: torch.device, *, sink_mask: bool = True
) -> WindowTargets:
    """Decodes stored maps on `device` and averages them into the windows.

    Args:
        maps: stored maps of each sample; None gives zeros.
        matching: windows, codec, and the stored windows; for windows that are not stored, masks are made from the
            decoded maps and the exact thresholds.
        device: where to decode; `Batch.to` has moved a batch's maps there, so that nothing waits for a copy.
        sink_mask: False keeps sinks too: every key that a query may attend to.

    Raises:
        ValueError: only some layers were read.
    """
    counts = [0 if m is None else m.num_tokens for m in maps]
    width = max(counts, default=0)
    maps_WBNN = torch.zeros(len(matching.windows), len(maps), width, width, device=device)
    keep_WBNN = torch.zeros(maps_WBNN.shape, dtype=torch.bool, device=device)
    for row, stored in enumerate(maps):
        if stored is None:
            continue
        n = stored.num_tokens
        windows_WNN, keep_WNN = _decoded(stored, matching, device)
        maps_WBNN[:, row, :n, :n] = windows_WNN
        if not sink_mask:
            attended_NN = torch.ones(n, n, dtype=torch.bool, device=device)
            keep_WNN = attended_NN.tril() if matching.codec.causal else attended_NN
        keep_WBNN[:, row, :n, :n] = keep_WNN
    return WindowTargets(maps_WBNN, keep_WBNN, torch.tensor(counts, device=device))


def _decoded(stored: EncodedMaps, matching: LayerMatching, device: torch.device) -> tuple[Tensor, Tensor]:
    """`[W, N, N]` maps and masks of one image."""
    stored = stored.to(device)
    codec = MapCodec.of_layers(matching.codec, matching.captured_layers, matching.stored_windows)
    if not matching.stored_masks:
        return codec.estimate_windows(stored, window_rows(matching.captured_layers, matching.windows))
    decoded = codec.decode_windows(stored)
    if matching.windows == matching.stored_windows:
        return decoded
    chosen = [matching.stored_windows.index(window) for window in matching.windows]
    return decoded[0][chosen], decoded[1][chosen]


def capture_for(batch: Batch, layers: Sequence[int], device: torch.device) -> AttentionCapture:
    """The student's side: which maps to take while it runs on `batch`."""
    return AttentionCapture(layers=frozenset(layers), positions=batch.image_positions).to(device)
