"""The attention that each image token of a sample receives, in teacher and student, layer by layer.

Shape letters: W matched pairs of layers, S words of the answers, U their tokens, N image tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.attention.capturable_layers import refuse_without_maps
from stages.attention.capture import AttentionCapture
from stages.evaluation.attention.words import Word, rows_of
from stages.student.data.batch import Batch
from stages.student.layer_matching import WITHOUT_MAPS, LayerMatching
from stages.student.losses.attention import below_sink_threshold, pool_keys
from stages.student.model.student import Student
from stages.student.training.forward import decode_windows
from storage.codecs.token_cells import attended_cells


@dataclass(frozen=True)
class SampleAttention:
    """Attention of one sample, float32 on the CPU, in the order of its image tokens.

    Attributes:
        key: Of the sample.
        teacher_WN: Mean attention that each image token receives from image tokens, without sinks: entries above the
            threshold of the teacher's own map are left out. Of the stored maps, averaged over a window of layers.
        student_WN: The same of the student, with the thresholds of its own maps.
        teacher_with_sinks_WN, student_with_sinks_WN: Means over all image tokens that may attend to it.
        words: Of its answers.
        student_words_WSN: From each word to the image tokens, mean over the answer rows of the word's tokens.
    """

    key: str
    teacher_WN: Tensor
    student_WN: Tensor
    teacher_with_sinks_WN: Tensor
    student_with_sinks_WN: Tensor
    words: tuple[str, ...]
    student_words_WSN: Tensor


@torch.inference_mode()
def sample_attention(
    student: Student, batch: Batch, matching: LayerMatching, words: Sequence[Sequence[Word]] | None = None
) -> list[SampleAttention | None]:
    """The attention of each sample of a batch, in order; None for a sample without an image.

    Args:
        student: Has capture enabled; left in evaluation mode.
        batch: Any device and precision; of a collator for this student.
        matching: Which pairs of layers.
        words: Of each sample those whose attention is wanted, as `answer_words` gives them.

    Raises:
        UserError: If a matched layer gives no map.
    """
    batch = batch.to(student.device, student.dtype)
    if not batch.num_with_image:
        return [None] * len(batch.keys)
    words = words or [[] for _ in batch.keys]
    layers = matching.student_layers
    rows = [rows_of(each) for each in words]
    capture = AttentionCapture(frozenset(layers), batch.image_positions, rows, cells=batch.cells)
    student.eval().model(**batch.inputs, capture=capture.to(student.device), use_cache=False)
    refuse_without_maps("the student", layers, capture.maps, WITHOUT_MAPS)
    windows = decode_windows(batch.maps, matching, student.device)
    own_WBNN = torch.stack([capture.maps[layer] for layer in layers])
    own_keep_WBNN = torch.stack([below_sink_threshold(map_BNN, windows.num_tokens_B) for map_BNN in own_WBNN])
    found: list[SampleAttention | None] = []
    for row, (key, n) in enumerate(zip(batch.keys, windows.num_tokens_B.tolist(), strict=True)):
        if batch.maps[row] is None:
            found.append(None)
            continue
        own_WNN, teacher_WNN = own_WBNN[:, row, :n, :n], windows.maps_WBNN[:, row, :n, :n]
        attended_NN = torch.ones(n, n, dtype=torch.bool, device=student.device).tril()
        if batch.cells is not None and (cells_X := batch.cells[row]) is not None:
            attended_NN = attended_cells(cells_X.to(student.device))
        rows_WUN = torch.stack([capture.text_maps[layer][row] for layer in layers]).cpu()
        found.append(
            SampleAttention(
                key=key,
                teacher_WN=pool_keys(teacher_WNN, windows.keep_WBNN[:, row, :n, :n]).cpu(),
                student_WN=pool_keys(own_WNN, own_keep_WBNN[:, row, :n, :n] & attended_NN).cpu(),
                teacher_with_sinks_WN=pool_keys(teacher_WNN, attended_NN.expand_as(teacher_WNN)).cpu(),
                student_with_sinks_WN=pool_keys(own_WNN, attended_NN.expand_as(own_WNN)).cpu(),
                words=tuple(word.text for word in words[row]),
                student_words_WSN=word_means(rows_WUN, words[row]),
            )
        )
    return found


def word_means(rows_WUN: Tensor, words: Sequence[Word]) -> Tensor:
    """Of the rows of words, as `rows_of` lists them, the mean of each word."""
    parts = torch.split(rows_WUN, [len(word.rows_U) for word in words], 1) if words else ()
    return torch.stack([part.mean(1) for part in parts], 1) if words else rows_WUN[:, :0]
