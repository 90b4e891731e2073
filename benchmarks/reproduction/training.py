"""Trains a decoder of the miniature on stored features, with or without guided attention, and keeps its curve."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.reproduction.checkpoint import load_checkpoint, save_checkpoint
from benchmarks.reproduction.guide import Guide
from benchmarks.reproduction.model import Answerer, answer_loss
from benchmarks.reproduction.optimizer import Optimizer, rate_factor
from benchmarks.reproduction.scenes import NUM_CELLS, Questions, Scenes, ask

Curve = list[dict[str, float]]


@dataclass(frozen=True)
class Phase:
    """What counts from a step on."""

    first_step: int
    weights: dict[str, float]
    """Of each kind of question in the loss; 1 where none is given."""


@dataclass(frozen=True)
class Budget:
    """What a training may take, and what it is called in the log."""

    name: str
    steps: int
    batch: int
    seed: int
    """Of the order of the pictures."""
    fall_steps: int
    """The last steps, over which the rates fall."""
    rate: float = 1.0
    """Factor on the rates of `Optimizer`."""
    phases: tuple[Phase, ...] = ()
    """In order; none: all kinds count alike."""
    mastered: float | None = None
    """The rates fall, and the training ends, earlier if each kind of question beats its wrong word so often."""
    every: int = 50
    """Steps between two points of the curve, each with a checkpoint."""

    def weight_R(self, step: int, kind_R: Sequence[str]) -> Tensor:
        """`[R]`, of each question in the loss."""
        begun = [phase for phase in self.phases if phase.first_step <= step]
        weights = begun[-1].weights if begun else {}
        return torch.tensor([weights.get(kind, 1.0) for kind in kind_R])

    def rows_B(self, step: int, num_pictures: int) -> Tensor:
        """`[B]`: the pictures of a step; an epoch is drawn from its number, so that any step can be the next one."""
        epoch, at = divmod(step, num_pictures // self.batch)
        order = np.random.default_rng([self.seed, epoch]).permutation(num_pictures)
        return torch.from_numpy(order[at * self.batch : (at + 1) * self.batch])


@dataclass(frozen=True)
class Pictures:
    """Pictures as the decoder gets them."""

    features_BNd: Tensor
    scenes: Scenes
    questions: Questions

    @classmethod
    def of(cls, features_BNd: Tensor, scenes: Scenes) -> "Pictures":
        """With all that can be asked of them."""
        return cls(features_BNd, scenes, ask(scenes))


@dataclass
class Progress:
    """How far a training is; what a checkpoint says beside the tensors."""

    step: int = 0
    falls_at: int = 0
    """Step from which the rates fall."""
    curve: Curve = field(default_factory=list)
    processor_s: list[float] = field(default_factory=list)
    """Of the steps before each point of the curve, without the asking."""


def train(
    model: Answerer,
    train_on: Pictures,
    held_out: Pictures,
    budget: Budget,
    guide: Guide | None = None,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Trains in place, from the checkpoint if there is one. Returns the curve on the held-out pictures and the time."""
    optimizer, progress = Optimizer(model), Progress(falls_at=budget.steps - budget.fall_steps)
    settings = {**asdict(budget), "guided": guide is not None, "size": asdict(model.size)}
    guide = guide or Guide()
    if checkpoint and (found := load_checkpoint(checkpoint, model, optimizer, settings)):
        progress = Progress(**found)
    started, first = time.monotonic(), progress.step
    losses: list[float] = []
    processor = time.process_time()
    while progress.step < progress.falls_at + budget.fall_steps:
        losses.append(_step(model, optimizer, train_on, budget, guide, progress))
        progress.step += 1
        last = progress.falls_at + budget.fall_steps
        if progress.step % budget.every and progress.step < last:
            continue
        progress.processor_s.append(round(time.process_time() - processor, 2))
        point = {"step": progress.step, "loss": round(float(np.mean(losses)), 4), **accuracy(model, held_out)}
        progress.curve.append(point)
        if budget.mastered and min(point[kind] for kind in held_out.questions.kind_R) >= budget.mastered:
            progress.falls_at = min(progress.falls_at, progress.step)
        last = progress.falls_at + budget.fall_steps
        if checkpoint:
            save_checkpoint(checkpoint, model, optimizer, asdict(progress), settings)
        rate = (time.monotonic() - started) / (progress.step - first)
        said = " ".join(f"{key} {value:g}" for key, value in point.items())
        print(f"{budget.name}: {said}; {rate:.2f} s a step, {rate * (last - progress.step):.0f} s left", flush=True)
        losses, processor = [], time.process_time()
    per_step = round(sum(progress.processor_s) / progress.step, 4)
    return {"steps": progress.step, "processor_s_per_step": per_step, "curve": progress.curve}


def _step(
    model: Answerer, optimizer: Optimizer, train_on: Pictures, budget: Budget, guide: Guide, progress: Progress
) -> float:
    """One step; the cross entropy of the answers."""
    questions = train_on.questions
    rows_B = budget.rows_B(progress.step, len(train_on.scenes))
    asked_BR3, answer_BR = (torch.from_numpy(x)[rows_B] for x in (questions.asked_BR3, questions.answer_BR))
    logits_BRV, maps = model(train_on.features_BNd[rows_B].float(), asked_BR3, guide.layers)
    lm = answer_loss(logits_BRV, answer_BR, budget.weight_R(progress.step, questions.kind_R))
    loss = lm + guide.loss(logits_BRV, maps, rows_B, progress.step / budget.steps)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step(budget.rate * rate_factor(progress.step, progress.falls_at, budget.fall_steps))
    return float(lm.detach())


@torch.no_grad()
def answers(model: Answerer, pictures: Pictures, layers: tuple[int, ...] = ()) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits `[B, R, V]` and maps of all pictures."""
    asked_BR3 = torch.from_numpy(pictures.questions.asked_BR3)
    parts = [
        model(pictures.features_BNd[first : first + 64].float(), asked_BR3[first : first + 64], layers)
        for first in range(0, len(asked_BR3), 64)
    ]
    return torch.cat([logits for logits, _ in parts]), {at: torch.cat([maps[at] for _, maps in parts]) for at in layers}


def accuracy(model: Answerer, pictures: Pictures) -> dict[str, float]:
    """By kind of question: how often the answer beats its hard negative (chance .5), and every other word."""
    logits_BRV, _ = answers(model, pictures)
    answer_BR, negative_BR = (
        torch.from_numpy(x) for x in (pictures.questions.answer_BR, pictures.questions.negative_BR)
    )
    beats_BR = logits_BRV.gather(2, answer_BR[..., None]) > logits_BRV.gather(2, negative_BR[..., None])
    first_BR = logits_BRV.argmax(-1) == answer_BR
    found: dict[str, float] = {}
    for kind in dict.fromkeys(pictures.questions.kind_R):
        of_kind_R = torch.tensor([each == kind for each in pictures.questions.kind_R])
        found[kind] = round(float(beats_BR[:, of_kind_R].float().mean()), 4)
        found[f"{kind}_named"] = round(float(first_BR[:, of_kind_R].float().mean()), 4)
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
