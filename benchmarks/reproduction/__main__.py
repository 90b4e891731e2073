"""Checks a miniature world before any student is compared in it; each step is kept, and a second call resumes.

python -m benchmarks.reproduction world|teacher|attention|oracle [--folder runs/reproduction] [--seeds 0 1 2]
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.reproduction.gaze import gaze, object_tokens
from benchmarks.reproduction.model import Answerer, DecoderSize
from benchmarks.reproduction.oracle import oracle_maps
from benchmarks.reproduction.scenes import NUM_CELLS, draw_scenes
from benchmarks.reproduction.tower import features, locality, train_tower
from benchmarks.reproduction.training import Budget, Guide, Pictures, accuracy, answers, blinded, steps_to, train
from benchmarks.results import RESULTS, command_line, save_result

TRAIN_PICTURES, HELD_OUT_PICTURES = 8192, 256
TEACHER, STUDENT = DecoderSize(layers=4, width=96), DecoderSize(layers=2, width=64)
STUDENT_LAYERS = (0,)
"""What is guided: the student's layers before its middle third (`train.matching.span: early`)."""
SEED = 0
TEACHER_BUDGET = Budget("teacher", steps=2400, batch=8, seed=SEED, rate=0.5)
"""Lower rates than a student's, for wider matrices and smaller batches."""
STUDENT_STEPS, STUDENT_BATCH = 700, 16
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
    found = train(model, train_on, held_out, TEACHER_BUDGET)
    save_file(model.state_dict(), folder / "teacher.safetensors")
    return {
        "size": asdict(TEACHER),
        "budget": asdict(TEACHER_BUDGET),
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
    place_BK = torch.from_numpy(held_out.scenes.place_BK)
    is_object_BN = object_tokens(place_BK, NUM_CELLS)
    by_layer = {str(layer): gaze(of_layer, is_object_BN) for layer, of_layer in maps.items()}
    return {"auc_of_layer": by_layer, "oracle": gaze(oracle_maps(place_BK, NUM_CELLS), is_object_BN)}


def oracle_run(folder: Path, arm: str, seed: int) -> dict[str, Any]:
    """One student, guided by construction or not at all."""
    train_on, held_out = _pictures(folder)
    place_BK = torch.from_numpy(train_on.scenes.place_BK)
    settings = ORACLE_ARMS[arm]
    guide = None
    if settings is not None:
        guide = Guide(lambda rows_B: oracle_maps(place_BK[rows_B], NUM_CELLS), layers=STUDENT_LAYERS, **settings)
    model = _new_model(STUDENT, held_out, seed)
    found = train(model, train_on, held_out, Budget(f"{arm}, seed {seed}", STUDENT_STEPS, STUDENT_BATCH, seed), guide)
    return {
        "reached": accuracy(model, held_out),
        "image_tokens_apart": blinded(model, held_out),
        "steps_to_level": {key: steps_to(found["curve"], key, LEVEL) for key in CURVES},
        **found,
    }


def oracle(folder: Path, arms: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Students guided by construction beside students without an attention loss, in turns; earlier runs are kept."""
    found: dict[str, Any] = {arm: {} for arm in arms}
    for seed in seeds:
        for arm in arms:
            name = arm.replace(",", "").replace(" ", "_")
            path = folder / f"oracle-{name}-{seed}.json"
            found[arm][f"seed {seed}"] = kept(path, partial(oracle_run, folder, arm, seed))
    return {"size": asdict(STUDENT), "steps": STUDENT_STEPS, "batch": STUDENT_BATCH, "level": LEVEL, "arms": found}


_COUNTS = {"train": TRAIN_PICTURES, "validation": HELD_OUT_PICTURES}


def _pictures(folder: Path) -> tuple[Pictures, Pictures]:
    stored = load_file(folder / "features.safetensors")
    train_on, held_out = (Pictures.of(stored[split], draw_scenes(split, SEED, size)) for split, size in _COUNTS.items())
    return train_on, held_out


def _new_model(size: DecoderSize, pictures: Pictures, seed: int = SEED) -> Answerer:
    return Answerer(size, len(pictures.questions.kind_Q), seed)


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the file holds; made and written first if there is none."""
    if not path.exists():
        found = make()
        path.write_text(json.dumps(found, indent=1) + "\n")
    read: dict[str, Any] = json.loads(path.read_text())
    return read


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
    found = kept(args.folder / "world.json", partial(world, args.folder))
    if args.step in ("teacher", "attention"):
        found = kept(args.folder / "teacher.json", partial(teacher, args.folder))
    if args.step == "attention":
        found = kept(args.folder / "attention.json", partial(attention, args.folder))
    if args.step == "oracle":
        found = oracle(args.folder, args.arms, args.seeds)
    record = args.out / f"reproduction_{args.step}.json"
    save_result(record, torch.device("cpu"), command_line("benchmarks.reproduction"), {"seed": SEED, **found})


if __name__ == "__main__":
    main()
