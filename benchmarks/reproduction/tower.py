"""Trains the local tower on labels of cells, keeps its features of a fixed set of pictures, measures its locality."""

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.reproduction.model import LocalTower
from benchmarks.reproduction.optimizer import Optimizer
from benchmarks.reproduction.scenes import BLANK, COLOURS, GRID, NUM_CELLS, Scenes, render

STEPS, BATCH = 150, 24
PICTURES_AT_ONCE = 256


def train_tower(seed: int) -> tuple[LocalTower, dict[str, Any]]:
    """On pictures whose every cell is drawn alone: what is in it, its colour, its row and its column."""
    tower, rng = LocalTower(seed), np.random.default_rng([seed, 1])
    optimizer, started = Optimizer(tower, STEPS), time.process_time()
    place_N = torch.arange(NUM_CELLS)
    for step in range(STEPS):
        kind_BN, colour_BN = (rng.integers(size, size=(BATCH, NUM_CELLS)) for size in (BLANK + 1, len(COLOURS)))
        scenes = Scenes(kind_BN, colour_BN, np.zeros((BATCH, 0), dtype=np.int64))
        hidden_BND = tower(torch.from_numpy(render(scenes, rng)))
        seen_BN = torch.from_numpy(kind_BN != BLANK)
        labels = [torch.from_numpy(kind_BN), torch.from_numpy(colour_BN).where(seen_BN, -100)]
        labels += [place.expand(BATCH, -1) for place in (place_N // GRID, place_N % GRID)]
        outputs = [head(hidden_BND) for head in tower.heads]
        losses = [
            F.cross_entropy(out.flatten(0, 1), label.flatten()) for out, label in zip(outputs, labels, strict=True)
        ]
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step(step)
    right = [
        float((out.argmax(-1) == label)[label >= 0].float().mean()) for out, label in zip(outputs, labels, strict=True)
    ]
    names = ("kind", "colour", "row", "column")
    return tower, {
        "steps": STEPS,
        "processor_s": round(time.process_time() - started, 1),
        "accuracy_last_batch": {name: round(value, 4) for name, value in zip(names, right, strict=True)},
    }


@torch.no_grad()
def features(tower: LocalTower, scenes: Scenes, seed: int) -> Tensor:
    """`[B, N, D]` float16; the seed draws the pixels' noise."""
    rng = np.random.default_rng([seed, 2])
    parts = np.array_split(np.arange(len(scenes)), max(1, len(scenes) // PICTURES_AT_ONCE))
    return torch.cat([tower(torch.from_numpy(render(scenes.take(rows), rng))).half() for rows in parts])


def locality(features_BND: Tensor, scenes: Scenes) -> dict[str, float]:
    """Accuracy of a linear probe, on pictures it did not see, of an object's shape and colour.

    From the object's own token, and from the token beside it, which holds no other object.
    """
    place_BK = torch.from_numpy(scenes.place_BK)
    beside_BK = torch.where(place_BK % GRID < GRID - 1, place_BK + 1, place_BK - 1)
    found: dict[str, float] = {}
    for attribute, of_cell_BN in (("shape", scenes.kind_BN), ("colour", scenes.colour_BN)):
        label_BK = torch.from_numpy(of_cell_BN).gather(1, place_BK)
        for where, at_BK in (("own", place_BK), ("beside", beside_BK)):
            inputs_BKD = features_BND.float().gather(1, at_BK[..., None].expand(-1, -1, features_BND.shape[-1]))
            found[f"{attribute}_{where}"] = _probe(inputs_BKD, label_BK)
    return found


def _probe(inputs_BKD: Tensor, label_BK: Tensor) -> float:
    """Least squares on the first half of the pictures, accuracy on the second."""
    half = len(inputs_BKD) // 2
    inputs = F.pad(inputs_BKD, (0, 1), value=1.0)
    fitted, asked = inputs[:half].flatten(0, 1), inputs[half:].flatten(0, 1)
    targets = F.one_hot(label_BK[:half].flatten()).float()
    ridge = 1e-2 * torch.eye(fitted.shape[1])
    weights = torch.linalg.solve(fitted.T @ fitted + ridge, fitted.T @ targets)
    return round(float(((asked @ weights).argmax(-1) == label_BK[half:].flatten()).float().mean()), 4)
