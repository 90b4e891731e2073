"""What the steps of the reproduction depend on: sizes, budgets, counts of pictures, and where results are kept."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.reproduction.model import Answerer, DecoderSize
from benchmarks.reproduction.scenes import draw_scenes
from benchmarks.reproduction.tower import STEPS
from benchmarks.reproduction.training import Budget, Pictures

COUNTS = {"train": 16384, "validation": 256}
"""Pictures of each split that has been drawn."""
TEST_PICTURES = 512
"""Drawn by the comparison alone."""
SEED = 0
"""Of the world and the teacher."""
TEACHER, STUDENT = DecoderSize(layers=2, width=128), DecoderSize(layers=2, width=64)
TEACHER_BUDGET = Budget(
    "teacher", steps=4000, batch=16, seed=SEED, fall_steps=500, rate=0.4, mastered=0.93, every=100
)  # fmt: skip
STUDENT_BUDGET: dict[str, Any] = {"steps": 700, "batch": 16, "fall_steps": 280}
LEVEL = 0.75
"""Steps to this accuracy are counted."""
CURVES = ("colour", "end", "middle", "end_named", "middle_named")

WORLD_SETTINGS = {"seed": SEED, "pictures": COUNTS, "tower_steps": STEPS}
TEACHER_SETTINGS = {**WORLD_SETTINGS, "size": asdict(TEACHER), "budget": asdict(TEACHER_BUDGET)}
STUDENT_SETTINGS = {"size": asdict(STUDENT), "budget": STUDENT_BUDGET, "level": LEVEL}
"""A result that was kept with other settings is not taken for one of these."""


def pictures_of(folder: Path) -> tuple[Pictures, Pictures]:
    """The training and the validation pictures, with the tower's features."""
    stored = load_file(folder / "features.safetensors")
    train_on, held_out = (Pictures.of(stored[split], draw_scenes(split, SEED, size)) for split, size in COUNTS.items())
    return train_on, held_out


def load_teacher(folder: Path, num_questions: int) -> Answerer:
    """The trained teacher."""
    model = Answerer(TEACHER, num_questions, SEED)
    model.load_state_dict(load_file(folder / "teacher.safetensors"))
    return model.eval()
