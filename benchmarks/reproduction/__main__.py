"""Checks a miniature world before any student is compared in it; each step is kept, and a second call resumes.

python -m benchmarks.reproduction world|teacher|attention|oracle [--folder runs/reproduction] [--seeds 0 1 2]
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.reproduction.kept_runs import Runs, kept, with_earlier
from benchmarks.reproduction.model import Answerer, DecoderSize
from benchmarks.reproduction.object_attention import object_attention, object_tokens
from benchmarks.reproduction.oracle import oracle_maps
from benchmarks.reproduction.scenes import NUM_CELLS, draw_scenes
from benchmarks.reproduction.tower import STEPS, features, locality, train_tower
from benchmarks.reproduction.training import Budget, Guide, Phase, Pictures, accuracy, answers, blinded, steps_to, train
from benchmarks.results import RESULTS, command_line, save_result

TRAIN_PICTURES, HELD_OUT_PICTURES = 16384, 256
TEACHER, STUDENT = DecoderSize(layers=2, width=128), DecoderSize(layers=2, width=64)
STUDENT_LAYERS = (0,)
"""What is guided: the student's layers before its middle third (`train.matching.span: early`)."""
SEED = 0
TEACHER_BUDGET = Budget(
    "teacher", steps=4000, batch=16, seed=SEED, fall_steps=500, mastered=0.93, every=100,
    phases=(
        Phase(0, {"colour": 1.0, "end": 0.1, "middle": 0.1}),
        Phase(250, {"colour": 0.2, "end": 1.0, "middle": 1.0}),
    ),
)  # fmt: skip
"""Colours first; then relations, until they are known or the steps are used up."""
STUDENT_BUDGET: dict[str, Any] = {"steps": 700, "batch": 16, "fall_steps": 280}
ORACLE_ARMS: dict[str, dict[str, Any] | None] = {
    "no attention loss": None,
    "oracle, every entry": {"weight": 1.0, "sink_mask": False},
    "oracle, published mask": {"weight": 1.0, "sink_mask": True},
}
CURVES = ("colour", "end", "middle", "end_named", "middle_named")
LEVEL = 0.75


def world(folder: Path) -> dict[str, Any]:
    """Trains the tower, keeps the features of the training and validation pictures, and measures locality."""
    tower, report = train_tower(SEED)
    pictures = {split: draw_scenes(split, SEED, count) for split, count in _COUNTS.items()}
    stored = {split: features(tower, scenes, SEED) for split, scenes in pictures.items()}
    save_file(tower.state_dict(), folder / "tower.safetensors")
    save_file(stored, folder / "features.safetensors")
    return {"tower": report, "probe": locality(stored["validation"], pictures["validation"])}


def teacher(folder: Path) -> dict[str, Any]:
    """Trains the teacher; how far it comes, and how far without attention among image tokens."""
    train_on, held_out = _pictures(folder)
    model = _new_model(TEACHER, held_out)
    found = train(model, train_on, held_out, TEACHER_BUDGET, checkpoint=folder / "teacher-checkpoint.safetensors")
    save_file(model.state_dict(), folder / "teacher.safetensors")
    return {
        "settings": _TEACHER,
        "reached": accuracy(model, held_out),
        "image_tokens_apart": blinded(model, held_out),
        **found,
    }


def attention(folder: Path) -> dict[str, Any]:
    """Whether the teacher looks at the objects, layer by layer."""
    _, held_out = _pictures(folder)
    model = _new_model(TEACHER, held_out)
    model.load_state_dict(load_file(folder / "teacher.safetensors"))
    _, maps = answers(model.eval(), held_out, tuple(range(TEACHER.layers)))
    place_B6 = torch.from_numpy(held_out.scenes.place_B6)
    is_object_BN = object_tokens(place_B6, NUM_CELLS)
    by_layer = {str(layer): object_attention(of_layer, is_object_BN) for layer, of_layer in maps.items()}
    return {"auc_of_layer": by_layer, "oracle": object_attention(oracle_maps(place_B6, NUM_CELLS), is_object_BN)}


def oracle_run(folder: Path, arm: str, seed: int) -> dict[str, Any]:
    """One student, guided by construction or not at all."""
    train_on, held_out = _pictures(folder)
    place_B6 = torch.from_numpy(train_on.scenes.place_B6)
    settings = ORACLE_ARMS[arm]
    guide = None
    if settings is not None:
        guide = Guide(lambda rows_B: oracle_maps(place_B6[rows_B], NUM_CELLS), layers=STUDENT_LAYERS, **settings)
    model = _new_model(STUDENT, held_out, seed)
    budget = Budget(f"{arm}, seed {seed}", seed=seed, **STUDENT_BUDGET)
    checkpoint = folder / f"{_run_name(arm, seed)}.safetensors"
    found = train(model, train_on, held_out, budget, guide, checkpoint)
    return {
        "reached": accuracy(model, held_out),
        "image_tokens_apart": blinded(model, held_out),
        "steps_to_level": {key: steps_to(found["curve"], key, LEVEL) for key in CURVES},
        **found,
    }


def oracle(folder: Path, arms: Sequence[str], seeds: Sequence[int]) -> Runs:
    """Students guided by construction beside students without an attention loss, in turns; earlier runs are kept."""
    found: Runs = {arm: {} for arm in arms}
    for seed in seeds:
        for arm in arms:
            path = folder / f"{_run_name(arm, seed)}.json"
            found[arm][f"seed {seed}"] = _kept(path, _ORACLE, partial(oracle_run, folder, arm, seed))
    return found


def _run_name(arm: str, seed: int) -> str:
    return f"oracle-{arm.replace(',', '').replace(' ', '_')}-{seed}"


def _kept(path: Path, settings: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    return kept(path, settings, " ".join(command_line("benchmarks.reproduction")), make)


_COUNTS = {"train": TRAIN_PICTURES, "validation": HELD_OUT_PICTURES}
_WORLD = {"seed": SEED, "pictures": _COUNTS, "tower_steps": STEPS}
_TEACHER = {**_WORLD, "size": asdict(TEACHER), "budget": asdict(TEACHER_BUDGET)}
_ORACLE = {
    **_WORLD, "size": asdict(STUDENT), "budget": STUDENT_BUDGET, "arms": ORACLE_ARMS, "layers": STUDENT_LAYERS,
    "level": LEVEL,
}  # fmt: skip
"""What each step depends on: a result that was kept with other settings is not taken for one of these."""


def _pictures(folder: Path) -> tuple[Pictures, Pictures]:
    stored = load_file(folder / "features.safetensors")
    train_on, held_out = (Pictures.of(stored[split], draw_scenes(split, SEED, size)) for split, size in _COUNTS.items())
    return train_on, held_out


def _new_model(size: DecoderSize, pictures: Pictures, seed: int = SEED) -> Answerer:
    return Answerer(size, len(pictures.questions.kind_R), seed)


def main() -> None:
    """Runs one step and those before it, and writes its record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["world", "teacher", "attention", "oracle"])
    parser.add_argument("--folder", type=Path, default=Path("runs/reproduction"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ORACLE_ARMS), choices=list(ORACLE_ARMS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    found = _kept(args.folder / "world.json", _WORLD, partial(world, args.folder))
    if args.step in ("teacher", "attention"):
        found = _kept(args.folder / "teacher.json", _TEACHER, partial(teacher, args.folder))
    if args.step == "attention":
        found = _kept(args.folder / "attention.json", _TEACHER, partial(attention, args.folder))
    record = args.out / f"reproduction_{args.step}.json"
    if args.step == "oracle":
        runs = with_earlier(record, _ORACLE, oracle(args.folder, args.arms, args.seeds))
        found = {"settings": _ORACLE, "arms": runs}
    save_result(record, torch.device("cpu"), command_line("benchmarks.reproduction"), {"seed": SEED, **found})


if __name__ == "__main__":
    main()
