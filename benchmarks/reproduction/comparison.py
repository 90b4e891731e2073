"""Students that learn from one teacher's targets, arm by arm and seed by seed, and what differs between them."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.intervals import estimate
from benchmarks.reproduction.arms import CLAIMED, EXPLORED, REFERENCES, Arm
from benchmarks.reproduction.checks import oracle_guide, reached
from benchmarks.reproduction.guide import AttentionGuide, Guide, MapsOf
from benchmarks.reproduction.model import Answerer
from benchmarks.reproduction.scenes import draw_scenes
from benchmarks.reproduction.settings import (
    SEED,
    STUDENT,
    STUDENT_BUDGET,
    STUDENT_SETTINGS,
    TEACHER,
    TEACHER_SETTINGS,
    TEST_PICTURES,
    load_teacher,
    pictures_of,
)
from benchmarks.reproduction.tower import features, load_tower
from benchmarks.reproduction.training import Budget, Pictures, train
from storage.codecs.attention_maps import MapCodec
from storage.codecs.codec_settings import MapCodecConfig

ARMS = {**CLAIMED, **EXPLORED}
PICTURES_AT_ONCE = 64
COMPARISON_SETTINGS = {
    "teacher": TEACHER_SETTINGS, **STUDENT_SETTINGS, "test_pictures": TEST_PICTURES,
    "arms": {name: asdict(arm) for name, arm in ARMS.items()},
}  # fmt: skip


@torch.no_grad()
def targets(folder: Path) -> dict[str, Any]:
    """One pass of the teacher over the training pictures: maps of all layers in float16, and logits."""
    train_on, held_out = pictures_of(folder)
    layers = tuple(range(TEACHER.layers))
    model = load_teacher(folder, len(held_out.questions.kind_R))
    asked_PR3 = torch.from_numpy(train_on.questions.asked_BR3)
    parts: dict[str, list[Tensor]] = {"logits": [], **{str(layer): [] for layer in layers}}
    for first in range(0, len(asked_PR3), PICTURES_AT_ONCE):
        rows = slice(first, first + PICTURES_AT_ONCE)
        logits_BRV, maps = model(train_on.features_BNd[rows].float(), asked_PR3[rows], layers)
        parts["logits"].append(logits_BRV)
        for layer, map_BNN in maps.items():
            parts[str(layer)].append(map_BNN.half())
    stored = {name: torch.cat(part) for name, part in parts.items()}
    save_file(stored, folder / "targets.safetensors")
    return {"shapes": {name: list(tensor.shape) for name, tensor in stored.items()}}


def run_name(split: str, arm: str, seed: int) -> str:
    """Of the files of a run."""
    return f"{split}-{arm.replace(',', '').replace(' ', '_')}-{seed}"


def compared_run(split: str, folder: Path, arm: str, seed: int) -> dict[str, Any]:
    """One student, its curve on the pictures of a split."""
    train_on, held_out = pictures_of(folder)
    if split == "test":
        scenes = draw_scenes("test", SEED, TEST_PICTURES)
        held_out = Pictures.of(features(load_tower(folder / "tower.safetensors"), scenes, SEED), scenes)
    num_questions, settings = len(held_out.questions.kind_R), ARMS[arm]
    fetched = load_teacher(folder, num_questions) if settings.fetched_projector else None
    model = Answerer(STUDENT, num_questions, seed, fetched)
    budget = Budget(f"{arm}, seed {seed}", seed=seed, **STUDENT_BUDGET)
    guide = _guide(settings, train_on, load_file(folder / "targets.safetensors"))
    found = train(model, train_on, held_out, budget, guide, folder / f"{run_name(split, arm, seed)}.safetensors")
    return reached(model, held_out, found)


def _guide(arm: Arm, train_on: Pictures, stored: Mapping[str, Tensor]) -> Guide:
    settings: dict[str, Any] = {
        "weight": arm.weight, "until": arm.until, "kind": arm.kind, "sink_mask": arm.sink_mask,
    }  # fmt: skip
    attention = None
    if arm.oracle:
        attention = oracle_guide(train_on, **settings)
    elif arm.attention:
        every = range(TEACHER.layers)
        maps_of: dict[int, MapsOf] = {
            layer: partial(_mean_map, [stored[str(each)] for each in (every if arm.grouped else [layer])], _coded(arm))
            for layer in arm.layers
        }
        attention = AttentionGuide(maps_of, **settings)
    return Guide(attention, stored["logits"] if arm.logits else None)


def _mean_map(layers: list[Tensor], coded: Callable[[Tensor], Tensor], rows_B: Tensor) -> Tensor:
    return torch.stack([coded(map_PNN[rows_B].float()) for map_PNN in layers]).mean(0)


def _coded(arm: Arm) -> Callable[[Tensor], Tensor]:
    """What a store gives back of maps `[B, N, N]`."""
    if arm.codec == "float16":
        return lambda maps_BNN: maps_BNN
    codec = MapCodec(MapCodecConfig(name=arm.codec))
    return lambda maps_BNN: torch.stack([codec.decode(codec.encode(map_NN[None]))[0] for map_NN in maps_BNN])


def summary(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds with 95 % intervals; differences to each reference arm, seed by seed."""
    measured = {arm: {seed: _measures(run) for seed, run in runs.items()} for arm, runs in arms.items()}
    return {
        "arms": {
            arm: {
                measure: estimate([of_seed[measure] for of_seed in runs.values()])
                for measure in next(iter(runs.values()))
            }
            for arm, runs in measured.items()
        },
        "differences": {
            f"{arm} - {reference}": _differences(measured[arm], measured[reference])
            for reference in REFERENCES
            for arm in measured
            if reference in measured and arm != reference
        },
    }


def _measures(run: Mapping[str, Any]) -> dict[str, float]:
    curve, steps = run["curve"], STUDENT_BUDGET["steps"]
    at = [0.0, *(point["step"] for point in curve)]
    found = {
        f"area_{key}": float(np.trapezoid([0.0, *(point[key] for point in curve)], at)) / steps
        for key in ("end_named", "middle_named")
    }
    found |= {key: run["reached"][key] for key in ("colour", "end", "middle", "end_named", "middle_named")}
    for key in ("end", "end_named"):
        # Who does not get there counts as if at the last step.
        found[f"steps_{key}"] = run["steps_to_level"][key] or float(steps)
    found["processor_s_per_step"] = run["processor_s_per_step"]
    return found


def _differences(
    runs: Mapping[str, Mapping[str, float]], reference: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    seeds = [seed for seed in runs if seed in reference]
    found: dict[str, Any] = {}
    for measure in runs[seeds[0]]:
        differences = [runs[seed][measure] - reference[seed][measure] for seed in seeds]
        found[measure] = {**estimate(differences), "sign_flip_p": sign_flip_p(differences)}
    return found


def sign_flip_p(differences: list[float]) -> float:
    """Two-sided and exact: how many of the 2**n choices of signs give a mean at least as far from 0."""
    values = np.array(differences)
    means = np.array(list(product((-1, 1), repeat=len(values)))) @ values
    return float(np.mean(np.abs(means) >= abs(values.sum()) - 1e-12))
