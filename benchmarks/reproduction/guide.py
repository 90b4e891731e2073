"""What a student's loss has beside its answers: attention maps to be drawn to, and a teacher's logits.

Shape letters are those of docs/architecture.md: B pictures, R questions of a picture, N image tokens, V words.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.student.losses.attention import below_sink_threshold, matched_loss
from stages.student.losses.logits import logit_distillation_loss
from stages.student.stage_config import AttentionLoss

MapsOf = Callable[[Tensor], Tensor]
"""Rows of the training pictures `[B]` to the maps `[B, N, N]` that a layer is drawn to."""


@dataclass(frozen=True)
class AttentionGuide:
    """Which maps a student's layers are drawn to, and how."""

    maps_of: dict[int, MapsOf]
    """By the student's layer."""
    weight: float = 1.0
    until: float | None = None
    """Share of the steps over which the weight falls to 0; None: it stays."""
    kind: AttentionLoss = "cosine"
    sink_mask: bool = True
    """True: the published loss. False: entries far above the mean of a map count as well, on both sides."""

    def loss(self, maps: dict[int, Tensor], rows_B: Tensor, share: float) -> Tensor:
        """Sum over layers, mean over the batch; `share` of the steps are done."""
        losses = [self._of_layer(maps[layer], maps_of(rows_B)) for layer, maps_of in self.maps_of.items()]
        weight = self.weight * (1.0 if self.until is None else max(0.0, 1 - share / self.until))
        return weight * torch.stack(losses).sum(0).mean()

    def _of_layer(self, student_BNN: Tensor, wanted_BNN: Tensor) -> Tensor:
        keep_BNN = wanted_BNN > 0
        if self.sink_mask:
            keep_BNN &= below_sink_threshold(wanted_BNN)
        return matched_loss(student_BNN, wanted_BNN, keep_BNN, kind=self.kind, sink_mask=self.sink_mask)


@dataclass(frozen=True)
class Guide:
    """All that a student learns from beside its answers; by default nothing."""

    attention: AttentionGuide | None = None
    logits_PRV: Tensor | None = None
    """The teacher's, of all training pictures."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Of the student, whose maps are needed."""
        return tuple(self.attention.maps_of) if self.attention else ()

    def loss(self, logits_BRV: Tensor, maps: dict[int, Tensor], rows_B: Tensor, share: float) -> Tensor:
        """The sum of both terms."""
        loss = logits_BRV.new_zeros(())
        if self.attention:
            loss = loss + self.attention.loss(maps, rows_B, share)
        if self.logits_PRV is not None:
            loss = loss + logit_distillation_loss(logits_BRV.flatten(0, 1), self.logits_PRV[rows_B].flatten(0, 1))
        return loss
