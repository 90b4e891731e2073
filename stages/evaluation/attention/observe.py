"""What is looked at of a sample's attention in one model: sink-free maps, what image tokens receive, rows of text.

Shape letters: W layers, or windows of layers; N image tokens; U text tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.attention.capturable_layers import refuse_without_maps
from stages.attention.capture import AttentionCapture
from stages.conversations.answer_rows import answer_sizes
from stages.student.layer_matching import LayerMatching
from stages.student.losses.attention import pool_keys
from stages.student.training.forward import decode_windows
from storage.codecs.attention_maps import EncodedMaps
from storage.codecs.sinks import sink_keep_mask
from storage.targets.sample_targets import SampleTargets


@dataclass(frozen=True)
class Observed:
    """One sample, on the CPU.

    Attributes:
        maps_WNN: As they are.
        keep_WNN: Which entries are no sinks.
        received_WN: Mean that each image token receives over the entries that are left.
        text_WN: Mean over the chosen rows of text; None where there are none.
    """

    maps_WNN: Tensor
    keep_WNN: Tensor
    received_WN: Tensor
    text_WN: Tensor | None = None


def observed(maps_WNN: Tensor, keep_WNN: Tensor, text_WN: Tensor | None = None) -> Observed:
    """A sample's maps, and what is pooled of the entries of `keep_WNN`."""
    return Observed(
        maps_WNN.float().cpu(),
        keep_WNN.cpu(),
        pool_keys(maps_WNN, keep_WNN).float().cpu(),
        None if text_WN is None else text_WN.float().cpu(),
    )


@torch.inference_mode()
def observe_stored(
    maps: Sequence[EncodedMaps | None], matching: LayerMatching, device: torch.device
) -> list[Observed | None]:
    """Stored maps of the teacher, averaged over the windows of `matching`; None for a sample without."""
    windows = decode_windows(maps, matching, device)
    sizes = [0 if one is None else one.num_tokens for one in maps]
    return [
        observed(windows.maps_WBNN[:, row, :n, :n], windows.keep_WBNN[:, row, :n, :n]) if n else None
        for row, n in enumerate(sizes)
    ]


def stored_answer_rows(targets: SampleTargets) -> Tensor | None:
    """`[L, N]` float32 of each captured layer: the mean over all answer rows, from what is stored of each answer."""
    values_LaN = targets.answer_attention_LaN
    if values_LaN is None or not values_LaN.shape[1]:
        return None
    sizes_a = torch.tensor(answer_sizes(targets.answer_mask), dtype=torch.float32)
    return torch.einsum("lan,a->ln", values_LaN.float(), sizes_a / sizes_a.sum())


@torch.inference_mode()
def observe_model(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    image_positions: Sequence[Tensor],
    windows: Sequence[Sequence[int]],
    text_positions: Sequence[Tensor] | None = None,
    cells: Sequence[Tensor | None] | None = None,
) -> list[Observed | None]:
    """A model that has capture enabled, run on a batch; each map is the mean of the layers of a window.

    With `cells`, the cell of each image token, maps and rows of text are of cells.

    Returns:
        Each sample; None without an image.

    Raises:
        UserError: If a layer gives no map.
    """
    layers = sorted({layer for window in windows for layer in window})
    capture = AttentionCapture(frozenset(layers), image_positions, text_positions, cells=cells).to(model.device)
    if not capture.num_keys:
        return [None] * len(image_positions)
    model.eval().model(**inputs, capture=capture, use_cache=False)
    refuse_without_maps("the model", layers, capture.maps, "compare others")
    found: list[Observed | None] = []
    for row, (positions, own) in enumerate(zip(image_positions, capture.cells, strict=True)):
        n = len(positions) if own is None else len(own)
        if not len(positions):
            found.append(None)
            continue
        maps = {layer: capture.maps[layer][row, :n, :n].float() for layer in layers}
        maps_WNN = torch.stack([torch.stack([maps[layer] for layer in window]).mean(0) for window in windows])
        text_WN = None
        if text_positions is not None and len(text_positions[row]):
            rows = {layer: capture.text_maps[layer][row].mean(0) for layer in layers}
            text_WN = torch.stack([torch.stack([rows[layer] for layer in window]).mean(0) for window in windows])
        found.append(observed(maps_WNN, sink_keep_mask(maps_WNN), text_WN))
    return found
