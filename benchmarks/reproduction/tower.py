"""Trains the local tower on labels of cells, keeps its features of a fixed set of pictures, measures its locality."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from benchmarks.reproduction.model import LocalTower
from benchmarks.reproduction.optimizer import Optimizer, rate_factor
from benchmarks.reproduction.scenes import BLANK, COLOURS, GRID, NUM_CELLS, Scenes, render

STEPS, FALL_STEPS, BATCH = 150, 60, 24
PICTURES_AT_ONCE = 256
PROBE_STEPS = 300


def train_tower(seed: int) -> tuple[LocalTower, dict[str, Any]]:
    """On pictures whose every cell is drawn alone: what is in it, its colour, its row and its column."""
    tower, rng = LocalTower(seed), np.random.default_rng([seed, 1])
    optimizer, started = Optimizer(tower), time.process_time()
    place_N = torch.arange(NUM_CELLS)
    for step in range(STEPS):
        kind_BN, colour_BN = (rng.integers(size, size=(BATCH, NUM_CELLS)) for size in (BLANK + 1, len(COLOURS)))
        scenes = Scenes(kind_BN, colour_BN, np.zeros((BATCH, 0), dtype=np.int64))
        hidden_BNd = tower(torch.from_numpy(render(scenes, rng)))
        seen_BN = torch.from_numpy(kind_BN != BLANK)
        labels = [torch.from_numpy(kind_BN), torch.from_numpy(colour_BN).where(seen_BN, -100)]
        labels += [place.expand(BATCH, -1) for place in (place_N // GRID, place_N % GRID)]
        outputs = [head(hidden_BNd) for head in tower.heads]
        losses = [
            F.cross_entropy(out.flatten(0, 1), label.flatten()) for out, label in zip(outputs, labels, strict=True)
        ]
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step(rate_factor(step, STEPS - FALL_STEPS, FALL_STEPS))
    right = [
        float((out.argmax(-1) == label)[label >= 0].float().mean()) for out, label in zip(outputs, labels, strict=True)
    ]
    names = ("kind", "colour", "row", "column")
    # Its training leaves features of deviation 5, on which decoders learn slowly; a Llava has no norm behind them.
    deviation = float(hidden_BNd.detach().std())
    tower.divide_features(deviation)
    return tower, {
        "steps": STEPS,
        "features_divided_by": round(deviation, 2),
        "processor_s": round(time.process_time() - started, 1),
        "accuracy_last_batch": {name: round(value, 4) for name, value in zip(names, right, strict=True)},
    }


def load_tower(path: Path) -> LocalTower:
    """A trained tower."""
    tower = LocalTower(0)
    tower.load_state_dict(load_file(path))
    return tower


def rendered(scenes: Scenes, seed: int) -> Iterator[NDArray[np.uint8]]:
    """The pixels of all pictures, some at a time; the seed draws their noise."""
    rng = np.random.default_rng([seed, 2])
    for rows in np.array_split(np.arange(len(scenes)), max(1, len(scenes) // PICTURES_AT_ONCE)):
        yield render(scenes.take(rows), rng)


@torch.no_grad()
def features(tower: LocalTower, scenes: Scenes, seed: int) -> Tensor:
    """`[B, N, d]` float16."""
    return torch.cat([tower(torch.from_numpy(pixels)).half() for pixels in rendered(scenes, seed)])


def locality(features_BNd: Tensor, scenes: Scenes) -> dict[str, float]:
    """Accuracy of a linear probe, on pictures it did not see, of an object's shape and colour.

    From the object's own token, and from the token beside it, which holds no other object.
    """
    place_B6 = torch.from_numpy(scenes.place_B6)
    beside_B6 = torch.where(place_B6 % GRID < GRID - 1, place_B6 + 1, place_B6 - 1)
    found: dict[str, float] = {}
    for attribute, of_cell_BN in (("shape", scenes.kind_BN), ("colour", scenes.colour_BN)):
        label_B6 = torch.from_numpy(of_cell_BN).gather(1, place_B6)
        for where, at_B6 in (("own", place_B6), ("beside", beside_B6)):
            inputs_B6d = features_BNd.float().gather(1, at_B6[..., None].expand(-1, -1, features_BNd.shape[-1]))
            found[f"{attribute}_{where}"] = _probe(inputs_B6d, label_B6)
    return found


def _probe(inputs_B6d: Tensor, label_B6: Tensor) -> float:
    """Logistic regression on the first half of the pictures, accuracy on the second."""
    half = len(inputs_B6d) // 2
    inputs = F.pad(inputs_B6d, (0, 1), value=1.0)
    fitted, asked, label = inputs[:half].flatten(0, 1), inputs[half:].flatten(0, 1), label_B6[:half].flatten()
    weights = torch.zeros(fitted.shape[1], int(label_B6.max()) + 1, requires_grad=True)
    optimizer = torch.optim.AdamW([weights], lr=0.05, weight_decay=0.0)
    for _ in range(PROBE_STEPS):
        optimizer.zero_grad()
        F.cross_entropy(fitted @ weights, label).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return round(float(((asked @ weights).argmax(-1) == label_B6[half:].flatten()).float().mean()), 4)
