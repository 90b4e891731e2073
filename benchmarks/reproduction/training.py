"""Trains a decoder of the miniature on stored features, with or without guided attention, and keeps its curve."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.reproduction.model import Answerer, answer_loss
from benchmarks.reproduction.optimizer import Optimizer
from benchmarks.reproduction.scenes import NUM_CELLS, Questions, Scenes, ask
from stages.student.losses.attention import below_sink_threshold, matched_loss

EVERY = 50
"""Steps between two points of a curve, in a training of at most 30 times as many."""

Curve = list[dict[str, float]]


@dataclass(frozen=True)
class Budget:
    """What a training may take, and what it is called in the log."""

    name: str
    steps: int
    batch: int
    seed: int
    """Of the order of the pictures."""
    rate: float = 1.0
    """Factor on the learning rates."""


@dataclass(frozen=True)
class Guide:
    """Which maps a student's layers are drawn to."""

    maps_of: Callable[[Tensor], Tensor]
    """Rows of the training pictures `[B]` to `[B, N, N]`."""
    layers: tuple[int, ...]
    weight: float
    sink_mask: bool
    """True: the published loss. False: entries far above the mean of a map count as well, on both sides."""

    def loss(self, maps: dict[int, Tensor], rows_B: Tensor) -> Tensor:
        """Sum over layers, mean over the batch."""
        wanted_BNN = self.maps_of(rows_B)
        keep_BNN = wanted_BNN > 0
        if self.sink_mask:
            keep_BNN &= below_sink_threshold(wanted_BNN)
        losses = [matched_loss(maps[at], wanted_BNN, keep_BNN, sink_mask=self.sink_mask) for at in self.layers]
        return self.weight * torch.stack(losses).sum(0).mean()


@dataclass(frozen=True)
class Pictures:
    """Pictures as the decoder gets them."""

    features_BND: Tensor
    scenes: Scenes
    questions: Questions

    @classmethod
    def of(cls, features_BND: Tensor, scenes: Scenes) -> "Pictures":
        """With all that can be asked of them."""
        return cls(features_BND, scenes, ask(scenes))


def train(
    model: Answerer, train_on: Pictures, held_out: Pictures, budget: Budget, guide: Guide | None = None
) -> dict[str, Any]:
    """Trains in place. Returns the curve on the held-out pictures and what a step took."""
    optimizer, generator = Optimizer(model, budget.steps, budget.rate), torch.Generator().manual_seed(budget.seed)
    asked_BQ3, answer_BQ = (torch.from_numpy(x) for x in (train_on.questions.asked_BQ3, train_on.questions.answer_BQ))
    order = torch.empty(0, dtype=torch.long)
    curve: Curve = []
    processor, started, spent = 0.0, time.monotonic(), []
    every = max(EVERY, budget.steps // 30)
    for step in range(budget.steps):
        if len(order) < budget.batch:
            order = torch.randperm(len(train_on.scenes), generator=generator)
        rows_B, order = order[: budget.batch], order[budget.batch :]
        processor = time.process_time()
        layers = guide.layers if guide else ()
        logits_BQV, maps = model(train_on.features_BND[rows_B].float(), asked_BQ3[rows_B], layers)
        lm = answer_loss(logits_BQV, answer_BQ[rows_B])
        loss = lm + guide.loss(maps, rows_B) if guide else lm
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(step)
        spent.append((time.process_time() - processor, float(lm.detach())))
        if (step + 1) % every == 0 or step + 1 == budget.steps:
            point = {"step": step + 1, "loss": round(float(np.mean([loss for _, loss in spent[-every:]])), 4)}
            curve.append({**point, **accuracy(model, held_out)})
            rate = (time.monotonic() - started) / (step + 1)
            left = f"{rate:.2f} s a step, {rate * (budget.steps - step - 1):.0f} s left"
            print(
                f"{budget.name}: {' '.join(f'{key} {value:g}' for key, value in curve[-1].items())}; {left}", flush=True
            )
    return {"processor_s_per_step": round(float(np.median([s for s, _ in spent])), 4), "curve": curve}


@torch.no_grad()
def answers(model: Answerer, pictures: Pictures, layers: tuple[int, ...] = ()) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits `[B, Q, V]` and maps of all pictures."""
    asked_BQ3 = torch.from_numpy(pictures.questions.asked_BQ3)
    parts = [
        model(pictures.features_BND[first : first + 64].float(), asked_BQ3[first : first + 64], layers)
        for first in range(0, len(asked_BQ3), 64)
    ]
    return torch.cat([logits for logits, _ in parts]), {at: torch.cat([maps[at] for _, maps in parts]) for at in layers}


def accuracy(model: Answerer, pictures: Pictures) -> dict[str, float]:
    """By kind of question: how often the answer beats its hard negative (chance .5), and every other word."""
    logits_BQV, _ = answers(model, pictures)
    answer_BQ, negative_BQ = (
        torch.from_numpy(x) for x in (pictures.questions.answer_BQ, pictures.questions.negative_BQ)
    )
    beats_BQ = logits_BQV.gather(2, answer_BQ[..., None]) > logits_BQV.gather(2, negative_BQ[..., None])
    first_BQ = logits_BQV.argmax(-1) == answer_BQ
    found: dict[str, float] = {}
    for kind in dict.fromkeys(pictures.questions.kind_Q):
        of_kind_Q = torch.tensor([each == kind for each in pictures.questions.kind_Q])
        found[kind] = round(float(beats_BQ[:, of_kind_Q].float().mean()), 4)
        found[f"{kind}_named"] = round(float(first_BQ[:, of_kind_Q].float().mean()), 4)
    return found


def blinded(model: Answerer, pictures: Pictures) -> dict[str, float]:
    """Accuracy when an image token can look at no other image token: what is left does not need such attention."""
    sees_TT = model.sees_TT.clone()
    image = slice(1, 1 + NUM_CELLS)
    model.sees_TT[image, image] = torch.eye(NUM_CELLS, dtype=torch.bool)
    try:
        return accuracy(model, pictures)
    finally:
        model.sees_TT.copy_(sees_TT)


def steps_to(curve: Curve, key: str, level: float) -> float | None:
    """Step at which a curve first reaches a level, between two points in a straight line; None if it never does."""
    before = {"step": 0.0, key: 0.0}
    for point in curve:
        if point[key] >= level:
            share = (level - before[key]) / (point[key] - before[key])
            return round(before["step"] + share * (point["step"] - before["step"]), 1)
        before = point
    return None
