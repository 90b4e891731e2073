"""Writes a scenes data set to disk: images, LLaVA conversations, captions, SugarCrepe caption pairs.

OUT/images/*.png, OUT/train.json (instructions), OUT/captions.json (one caption an image), OUT/objects.jsonl (the boxes
of each image's objects), OUT/pairs/KIND.json and OUT/pairs/images/*.png. Equal arguments give equal bytes. Pairs come
from a stream of their own: their scenes, and in the digits variant their drawings too, never appear in training.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.demo.scenes.draw import draw
from pipeline.demo.scenes.language import QUESTIONS, Exchange, QuestionKind, ask_caption, ask_without_image
from pipeline.demo.scenes.pairs import TRAIN_STREAM, sample_pairs
from pipeline.demo.scenes.world import Thing, Variant, generator, sample_scenes

_CHUNK = 500
_DATASET_STAGE = 3  # 0 to 2 are the stages of the teacher's own training
_TEXT_ONLY_SHARE = 0.03
_MAX_TURNS = 8
_MIX: dict[QuestionKind, float] = {
    "attribute": 3, "place": 3, "direction": 2, "caption": 2, "neighbour": 1, "presence": 0.5, "relation": 0.5,
    "count": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class DatasetReport:
    """What was written."""

    num_images: int
    num_conversations: int
    num_text_only: int
    num_pairs: int
    seconds: float


def conversation(exchanges: list[Exchange]) -> list[dict[str, str]]:
    """Turns in LLaVA's layout; the image stands before the first question, if the questions are about one."""
    turns = []
    for number, exchange in enumerate(exchanges):
        opening = "<image>\n" if exchange.about_image and number == 0 else ""
        turns.append({"from": "human", "value": opening + exchange.question})
        turns.append({"from": "gpt", "value": exchange.answer})
    return turns


def draw_exchanges(rng: np.random.Generator, things: list[Thing], variant: Variant, num: int) -> list[Exchange]:
    """`num` different questions about one image."""
    kinds, weights = list(_MIX), np.array(list(_MIX.values()))
    share = np.cumsum(weights) / weights.sum()
    found: dict[str, Exchange] = {}
    while len(found) < num:
        exchange = QUESTIONS[kinds[int(np.searchsorted(share, rng.random()))]](rng, things, variant)
        if exchange:
            found.setdefault(exchange.question, exchange)
    return list(found.values())


def write_dataset(
    out: Path, num_images: int, seed: int, variant: Variant = "shapes", num_pairs: int = 100
) -> DatasetReport:
    """Write `num_images` training images and `num_pairs` held-out pairs of each kind under `out`.

    Raises:
        FileExistsError: `out` already holds a data set.
    """
    started = time.monotonic()
    if (out / "train.json").exists():
        raise FileExistsError(f"{out} already holds a data set; name a new folder or remove it first")
    (out / "images").mkdir(parents=True, exist_ok=True)
    instructions: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    objects: list[str] = []
    for chunk in range(0, num_images, _CHUNK):
        rng = generator(seed, TRAIN_STREAM, _DATASET_STAGE, variant == "digits", chunk // _CHUNK)
        scenes = sample_scenes(rng, _CHUNK, variant, "train")
        pixels = draw(scenes, rng)
        for index in range(min(_CHUNK, num_images - chunk)):
            number = chunk + index
            name = f"images/{number:06d}.png"
            things = scenes.things(index)
            _write_image(out / name, pixels[index])
            objects.append(json.dumps({"image": name, "boxes": scenes.boxes(index)}))
            captions.append(_sample(f"caption-{number:06d}", [ask_caption(rng, things, variant)], name))
            for part in range(1 + int(rng.integers(0, 3))):  # two conversations an image on average
                num_turns = 1 + int(rng.integers(0, _MAX_TURNS))
                exchanges = draw_exchanges(rng, things, variant, num_turns)
                instructions.append(_sample(f"{number:06d}-{part}", exchanges, name))
    rng = generator(seed, TRAIN_STREAM, _DATASET_STAGE, 2)
    num_text_only = round(len(instructions) * _TEXT_ONLY_SHARE)
    for number in range(num_text_only):
        sample = _sample(f"text-{number:06d}", [ask_without_image(rng)], None)
        instructions.insert(int(rng.integers(0, len(instructions) + 1)), sample)
    _write_pairs(out / "pairs", num_pairs, seed, variant)
    # train.json comes last: where it stands, everything else does.
    (out / "objects.jsonl").write_text("".join(f"{line}\n" for line in objects))
    _write_json(out / "captions.json", captions)
    _write_json(out / "train.json", instructions)
    return DatasetReport(
        num_images=num_images,
        num_conversations=len(instructions),
        num_text_only=num_text_only,
        num_pairs=5 * num_pairs,
        seconds=round(time.monotonic() - started, 2),
    )


def _sample(name: str, exchanges: list[Exchange], image: str | None) -> dict[str, Any]:
    shown = {"image": image} if image else {}
    return {"id": name, **shown, "conversations": conversation(exchanges)}


def _write_pairs(folder: Path, num_pairs: int, seed: int, variant: Variant) -> None:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for kind, pairs in sample_pairs(num_pairs, seed, variant).items():
        entries = {}
        for number, pair in enumerate(pairs):
            name = f"{kind}-{number:05d}.png"
            _write_image(folder / "images" / name, pair.pixels)
            entries[str(number)] = {
                "filename": name,
                "caption": pair.caption,
                "negative_caption": pair.negative,
            }
        _write_json(folder / f"{kind}.json", entries)


def _write_image(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(path, compress_level=1)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
