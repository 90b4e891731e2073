"""What must hold of a world before students are compared: locality, a teacher that looks, the oracle's gain."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.reproduction.guide import AttentionGuide, Guide
from benchmarks.reproduction.model import Answerer
from benchmarks.reproduction.object_attention import object_attention, object_tokens
from benchmarks.reproduction.oracle import oracle_maps
from benchmarks.reproduction.scenes import NUM_CELLS, draw_scenes
from benchmarks.reproduction.settings import (
    COUNTS,
    CURVES,
    LEVEL,
    SEED,
    STUDENT,
    STUDENT_BUDGET,
    TEACHER,
    TEACHER_BUDGET,
    TEACHER_SETTINGS,
    load_teacher,
    pictures_of,
)
from benchmarks.reproduction.tower import features, locality, train_tower
from benchmarks.reproduction.training import Budget, Pictures, accuracy, answers, blinded, steps_to, train

ORACLE_ARMS: dict[str, dict[str, Any] | None] = {
    "no attention loss": None,
    "oracle, every entry": {"weight": 1.0, "sink_mask": False},
    "oracle, published mask": {"weight": 1.0, "sink_mask": True},
}
STUDENT_LAYERS = (0,)
"""What is guided: the student's layers before its middle third (`train.matching.span: early`)."""


def world(folder: Path) -> dict[str, Any]:
    """Trains the tower, keeps the features of the training and validation pictures, and measures locality."""
    tower, report = train_tower(SEED)
    pictures = {split: draw_scenes(split, SEED, count) for split, count in COUNTS.items()}
    stored = {split: features(tower, scenes, SEED) for split, scenes in pictures.items()}
    save_file(tower.state_dict(), folder / "tower.safetensors")
    save_file(stored, folder / "features.safetensors")
    return {"tower": report, "probe": locality(stored["validation"], pictures["validation"])}


def teacher(folder: Path) -> dict[str, Any]:
    """Trains the teacher; how far it comes, and how far without attention among image tokens."""
    train_on, held_out = pictures_of(folder)
    model = Answerer(TEACHER, len(held_out.questions.kind_R), SEED)
    found = train(model, train_on, held_out, TEACHER_BUDGET, checkpoint=folder / "teacher-checkpoint.safetensors")
    save_file(model.state_dict(), folder / "teacher.safetensors")
    return {"settings": TEACHER_SETTINGS, **reached(model, held_out, found)}


def attention(folder: Path) -> dict[str, Any]:
    """Whether the teacher looks at the objects, layer by layer."""
    _, held_out = pictures_of(folder)
    model = load_teacher(folder, len(held_out.questions.kind_R))
    _, maps = answers(model, held_out, tuple(range(TEACHER.layers)))
    place_B6 = torch.from_numpy(held_out.scenes.place_B6)
    is_object_BN = object_tokens(place_B6, NUM_CELLS)
    by_layer = {str(layer): object_attention(of_layer, is_object_BN) for layer, of_layer in maps.items()}
    return {"auc_of_layer": by_layer, "oracle": object_attention(oracle_maps(place_B6, NUM_CELLS), is_object_BN)}


def oracle_run(folder: Path, arm: str, seed: int) -> dict[str, Any]:
    """One student, guided by construction or not at all."""
    train_on, held_out = pictures_of(folder)
    settings = ORACLE_ARMS[arm]
    guide = None if settings is None else Guide(oracle_guide(train_on, **settings))
    model = Answerer(STUDENT, len(held_out.questions.kind_R), seed)
    budget = Budget(f"{arm}, seed {seed}", seed=seed, **STUDENT_BUDGET)
    found = train(model, train_on, held_out, budget, guide, folder / f"{oracle_name(arm, seed)}.safetensors")
    return reached(model, held_out, found)


def oracle_guide(pictures: Pictures, **settings: Any) -> AttentionGuide:
    """Draws the guided layers to the objects by construction."""
    place_B6 = torch.from_numpy(pictures.scenes.place_B6)
    maps_of = dict.fromkeys(STUDENT_LAYERS, lambda rows_B: oracle_maps(place_B6[rows_B], NUM_CELLS))
    return AttentionGuide(maps_of, **settings)


def oracle_name(arm: str, seed: int) -> str:
    """Of the files of a run."""
    return f"oracle-{arm.replace(',', '').replace(' ', '_')}-{seed}"


def reached(model: Answerer, held_out: Pictures, found: Mapping[str, Any]) -> dict[str, Any]:
    """A training's curve and time, and how far the model came, with all image tokens and with these kept apart."""
    return {
        "reached": accuracy(model, held_out),
        "image_tokens_apart": blinded(model, held_out),
        "steps_to_level": {key: steps_to(found["curve"], key, LEVEL) for key in CURVES},
        **found,
    }
