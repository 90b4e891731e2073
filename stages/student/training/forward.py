"""One batch through the student: its hidden states, its attention maps, and the teacher's windows beside them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.attention.capturable_layers import refuse_without_maps
from stages.attention.capture import AttentionCapture
from stages.attention.text_rows import AnswerQueries
from stages.student.data.answer_targets import NO_ANSWERS
from stages.student.data.batch import Batch
from stages.student.layer_matching import WITHOUT_MAPS, LayerMatching
from stages.student.model.student import OWN_CLASSES, Student
from storage.codecs.attention_maps import EncodedMaps, MapCodec
from storage.codecs.token_cells import attended_cells
from storage.codecs.windows import window_means, window_rows


@dataclass(frozen=True)
class WindowTargets:
    """The teacher's side of the attention loss for a batch, zero and False in the padding; N of the largest image."""

    maps_WBNN: Tensor
    keep_WBNN: Tensor
    num_tokens_B: Tensor


@dataclass(frozen=True)
class StudentOutput:
    """A student's side of a batch, and the teacher's attention beside it.

    Attributes:
        hidden_BTd: Hidden states.
        maps: `[B, N, N]` of each matched layer; none where no maps are compared.
        windows: The teacher's; None where no maps are compared.
        answers: Of each sample with answers the student's and the teacher's mean attention from them to its image
            tokens, `[W, a, N]` both; none where answer attention is not compared.
    """

    hidden_BTd: Tensor
    maps: list[Tensor]
    windows: WindowTargets | None
    answers: list[tuple[Tensor, Tensor]]


def run_student(
    student: Student, batch: Batch, matching: LayerMatching | None, *, sink_mask: bool = True
) -> StudentOutput:
    """Runs the decoder on a batch, and captures what it holds of the teacher's attention, if layers are matched.

    The batch is on the student's device; capture is enabled if layers are matched. `sink_mask`: see `decode_windows`.

    Raises:
        UserError: If a matched layer gives no map.
    """
    device = batch.answers.token_R.device
    if matching is None or not (batch.num_with_image or batch.num_answers):
        return StudentOutput(student.model(**_inputs(student, batch), use_cache=False).last_hidden_state, [], None, [])
    layers, images = matching.student_layers, batch.image_positions
    capture = AttentionCapture(
        layers=frozenset(layers),
        positions=images if batch.num_with_image else [at[:0] for at in images],
        answers=_answer_queries(batch),
        cells=batch.cells,
    ).to(device)
    hidden_BTd = student.model(**_inputs(student, batch), capture=capture, use_cache=False).last_hidden_state
    refuse_without_maps("the student", layers, capture.maps or capture.answer_maps, WITHOUT_MAPS)
    maps, windows = [], None
    if batch.num_with_image:
        maps = [capture.maps[layer] for layer in layers]
        windows = decode_windows(batch.maps, matching, device, sink_mask=sink_mask)
    rows = window_rows(matching.captured_layers, matching.windows)
    answers = [
        (torch.stack([capture.answer_maps[layer][row] for layer in layers]), window_means(one.stored_LaN, rows))
        for row, one in enumerate(batch.answer_targets)
        if one is not None
    ]
    return StudentOutput(hidden_BTd, maps, windows, answers)


def _answer_queries(batch: Batch) -> list[AnswerQueries] | None:
    """What is captured of the student's answers."""
    if not batch.num_answers:
        return None
    pairs = zip(batch.answer_targets, batch.image_positions, strict=True)
    return [NO_ANSWERS if one is None else one.queries(images_N) for one, images_N in pairs]


def _inputs(student: Student, batch: Batch) -> dict[str, Tensor]:
    """What the student is called with.

    Batches are padded on the right, so in a causal decoder no token sees the padding, and what padded positions give is
    never read. Without a mask the kernel leaves out all later keys, and a GPU can take its fastest one. A model of
    transformers may derive more from the mask, such as positions, and gets it.
    """
    if not isinstance(student, OWN_CLASSES):
        return batch.inputs
    return {name: value for name, value in batch.inputs.items() if name != "attention_mask"}


def decode_windows(
    maps: Sequence[EncodedMaps | None], matching: LayerMatching, device: torch.device, *, sink_mask: bool = True
) -> WindowTargets:
    """Decodes stored maps on `device` and averages them into windows.

    Sink masks of windows that are not stored are made from the decoded maps and the exact thresholds. Without
    `sink_mask` sinks are kept too: every key that a query may attend to. A sample without maps gives zeros. `Batch.to`
    has moved a batch's maps to the device, so that nothing waits for a copy.

    Raises:
        ValueError: If only some layers were read.
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
            if stored.cells_X is not None:
                attended_NN = attended_cells(stored.cells_X.to(device))
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
