"""The losses of training with the teacher in the loop, by which the demo measures what stored targets change.

Nothing that is stored is read: the teacher runs on every batch, and its maps and whole vocabularies are compared with
the student's by the definitions of docs/method.md.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText

from pipeline.demo.assets import TEACHER
from stages.attention.capture import AttentionCapture, enable_capture
from stages.student.data.batch import Batch
from stages.student.losses.attention import attention_alignment_loss
from stages.student.losses.logits import logit_distillation_loss
from stages.student.training.objective import BatchTotals, DistillationObjective
from storage.codecs.windows import window_means, window_rows


class TeacherInTheLoop(DistillationObjective):
    """The objective of training with the bundled teacher, whose pictures have equally many tokens."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        load = AutoModelForImageTextToText.from_pretrained
        teacher = load(TEACHER, dtype=torch.float32, trust_remote_code=False).eval()
        enable_capture(teacher)
        # In a list: no part of this module, so that it is neither trained nor saved.
        self.teacher = [teacher]

    def forward(self, batch: Batch, totals: BatchTotals) -> tuple[Tensor, dict[str, Tensor]]:
        """As the objective of training."""
        layers = () if self.matching is None else self.matching.student_layers
        captured = () if self.matching is None else self.matching.captured_layers
        with torch.no_grad():
            wanted_RV, teacher_LBNN = _answer_logits_and_maps(self.teacher[0], batch, captured)
        own_RV, student_LBNN = _answer_logits_and_maps(self.student, batch, layers)
        share = len(batch.answers) / totals.answer_rows
        terms = {"lm": F.cross_entropy(own_RV, batch.answers.token_R) * share}
        if self.weights["kd"] > 0:
            terms["kd"] = logit_distillation_loss(own_RV, wanted_RV) * share
        if self.matching is not None and batch.num_with_image:
            windows_LBNN = window_means(teacher_LBNN, window_rows(captured, self.matching.windows))
            loss = attention_alignment_loss(student_LBNN, windows_LBNN)
            terms["attention"] = loss * batch.num_with_image / totals.samples_with_image
        loss = torch.stack([self.weights[name] * value for name, value in terms.items()]).sum()
        return loss, {name: value.detach() for name, value in terms.items()}


def _answer_logits_and_maps(model: Any, batch: Batch, layers: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """`[R, V]` logits at answer rows, and the `[L, B, N, N]` maps of the samples that have an image."""
    capture = AttentionCapture(frozenset(layers), batch.image_positions, cells=batch.cells)
    hidden_BTd = model.model(**batch.inputs, capture=capture, use_cache=False).last_hidden_state
    logits_RV = model.lm_head(hidden_BTd[batch.answers.sequence_R, batch.answers.position_R])
    with_image = [row for row, positions in enumerate(batch.image_positions) if len(positions)]
    maps = [capture.maps[layer][with_image] for layer in layers] if with_image else []
    return logits_RV, torch.stack(maps) if maps else torch.zeros(0)
