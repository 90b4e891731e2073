"""How similar a student's visual attention is to the teacher's cached maps.

The similarity of two maps is the cosine over their causal entries below the sink threshold of either side. Any two
models have similar pooled vectors, which the loss compares; raw maps separate models better.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from stages.student.data.batch import Batch
from stages.student.layer_matching import LayerMatching
from stages.student.losses.attention import below_sink_threshold, matched_loss
from stages.student.model.student import Student
from stages.student.training.forward import run_student
from storage.progress import SILENT, ProgressTask
from storage.strict_model import StrictModel

_NOT_SHOWN = SILENT.task("compare")

LayersFrom = Literal["training", "default"]


class AttentionSimilarity(StrictModel):
    """Means over samples, for each matched pair of layers."""

    student_layers: tuple[int, ...]
    windows: tuple[tuple[int, ...], ...]
    layers_from: LayersFrom = "default"
    """Whether the pairs are those that the run trained, or those matched by default."""
    num_samples: int
    similarity: tuple[float, ...]
    """Cosine of the raw maps without sinks; 1 is equal."""
    alignment_loss: tuple[float, ...]
    """The attention loss of the pair; 0 is aligned."""

    @property
    def mean(self) -> float:
        """Mean similarity over the matched pairs."""
        return sum(self.similarity) / len(self.similarity)


@torch.inference_mode()
def attention_similarity(
    student: Student,
    batches: Iterable[Batch],
    matching: LayerMatching,
    task: ProgressTask = _NOT_SHOWN,
    *,
    layers_from: LayersFrom = "default",
    of_samples: dict[str, tuple[float, ...]] | None = None,
) -> AttentionSimilarity:
    """Runs the student over `batches` and compares its maps with the stored ones.

    Samples without an image do not count. The student has capture enabled and is left in evaluation mode. The
    similarities of each sample are put into `of_samples`, by its key.
    """
    student.eval()
    similarity_W = torch.zeros(len(matching.student_layers), dtype=torch.float64)
    loss_W = torch.zeros_like(similarity_W)
    count = 0
    for cpu_batch in batches:
        batch = cpu_batch.to(student.device, student.dtype)
        if batch.num_with_image:
            output = run_student(student, batch, matching)
            student_maps, windows = output.maps, output.windows
            assert windows is not None
            num_tokens_B = windows.num_tokens_B
            pairs = list(zip(student_maps, windows.maps_WBNN, windows.keep_WBNN, strict=True))
            similarity_WB = torch.stack([map_similarity(*maps, num_tokens_B) for maps in pairs]).cpu().double()
            counts = (num_tokens_B > 0).tolist()
            similarity_W += similarity_WB[:, counts].sum(1)
            for w, maps in enumerate(pairs):
                loss_W[w] += float(matched_loss(*maps, num_tokens_B).sum())
            if of_samples is not None:
                found = zip(batch.keys, similarity_WB.T.tolist(), counts, strict=True)
                of_samples |= {key: tuple(values) for key, values, is_counted in found if is_counted}
            count += batch.num_with_image
        task.advance(len(batch.keys))
    return AttentionSimilarity(
        student_layers=matching.student_layers,
        windows=matching.windows,
        layers_from=layers_from,
        num_samples=count,
        similarity=tuple((similarity_W / max(count, 1)).tolist()),
        alignment_loss=tuple((loss_W / max(count, 1)).tolist()),
    )


def map_similarity(student_BNN: Tensor, teacher_BNN: Tensor, teacher_keep_BNN: Tensor, num_tokens_B: Tensor) -> Tensor:
    """`[B]` cosine over the entries that neither side's sink threshold drops."""
    keep_BNN = teacher_keep_BNN & below_sink_threshold(student_BNN, num_tokens_B)
    own, wanted = ((maps * keep_BNN).flatten(1) for maps in (student_BNN, teacher_BNN))
    return torch.cosine_similarity(own, wanted, dim=-1)
