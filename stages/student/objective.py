"""The training objective of a batch: LM + logit distillation + attention alignment, from stored targets.

Shape letters: B samples, R answer rows, V vocabulary, W windows, N image tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stages.student.batches import Batch, WindowTargets, capture_for, decode_windows
from stages.student.build import Student
from stages.student.config import StageConfig
from stages.student.losses import next_token_loss, pooled_cosine_loss, stored_logit_distillation_loss
from stages.student.matching import LayerMatching
from storage.codecs.answer_logits import LogitCodecConfig, decode_logits


@dataclass(frozen=True)
class BatchTotals:
    """What the sums are divided by: counts over the whole global batch, all ranks and accumulation steps."""

    answer_rows: int
    samples_with_image: int


class DistillationObjective(nn.Module):
    """Wraps the student, so that one `forward` computes a microbatch's share of the loss (and DDP sees one module)."""

    def __init__(
        self, student: Student, stage: StageConfig, logit_codec: LogitCodecConfig, matching: LayerMatching | None
    ) -> None:
        super().__init__()
        self.student = student
        self.weights = {"lm": stage.lm_weight, "kd": stage.kd_weight, "attention": stage.attention_weight}
        self.logit_codec, self.temperature = logit_codec, stage.kd_temperature
        self.matching = matching

    def forward(self, batch: Batch, totals: BatchTotals) -> tuple[Tensor, dict[str, Tensor]]:
        """The microbatch's share of the global batch's loss, and of each term (detached, unweighted).

        Summed over all microbatches of the global batch the shares give: LM and KD as means over answer rows,
        attention as the sum over matched layers, mean over the samples with an image.
        """
        if not batch.keys:
            return self._nothing(batch.answer_R.device)
        device = batch.answer_R.device
        matching = self.matching if self.weights["attention"] > 0 else None
        align = matching is not None and batch.num_with_image > 0
        capture = capture_for(batch, matching.student_layers, device) if matching is not None and align else None
        hidden_BTd = self.student.model(**batch.inputs, capture=capture, use_cache=False).last_hidden_state
        # Vocabulary logits at answer rows only: image and question positions predict nothing that is scored.
        logits_RV = self.student.lm_head(hidden_BTd[batch.row_index_R, batch.row_position_R])

        rows = max(totals.answer_rows, 1)
        terms = {"lm": next_token_loss(logits_RV, batch.answer_R).sum() / rows}
        if self.weights["kd"] > 0:
            stored = decode_logits(self.logit_codec, batch.logits_RB)
            terms["kd"] = stored_logit_distillation_loss(logits_RV, stored, self.temperature).sum() / rows
        if matching is not None:
            # There also for a batch of text alone: all ranks sum up the same terms.
            terms["attention"] = torch.zeros((), device=device)
        if matching is not None and capture is not None:
            targets = decode_windows(batch.maps, matching, device)
            student_maps = [capture.maps[layer] for layer in matching.student_layers]
            loss_B = alignment_loss_B(student_maps, targets)
            terms["attention"] = loss_B.sum() / max(totals.samples_with_image, 1)
        loss = torch.stack([self.weights[name] * value for name, value in terms.items()]).sum()
        if "pixel_values" not in batch.inputs:
            # Text alone does not go through the post-connector, which may be all that learns and which DDP waits for.
            loss = loss + torch.stack([p.sum() * 0 for p in self.student.model.post_connector.parameters()]).sum()
        return loss, {name: value.detach() for name, value in terms.items()}

    def _nothing(self, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """A rank without a share of the last step still takes part in it, with zero gradients."""
        names = [name for name, weight in self.weights.items() if name == "lm" or weight > 0]
        loss = torch.stack([p.sum() * 0 for p in self.parameters() if p.requires_grad]).sum()
        return loss, {name: torch.zeros((), device=device) for name in names}


def alignment_loss_B(student_maps: list[Tensor], targets: WindowTargets) -> Tensor:
    """`[B]` attention loss of each sample, summed over matched layers; 0 for a sample without an image."""
    losses = [
        pooled_cosine_loss(student_BNN, targets.maps_WBNN[w], targets.keep_WBNN[w], targets.num_tokens_B)
        for w, student_BNN in enumerate(student_maps)
    ]
    return torch.stack(losses).sum(0)
