from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.scenes.choice import ask_choice
from examples.scenes.patches import GRID, NO_KIND, PATCH_SIZE, patch_labels
from pipeline.demo.scenes import language, world
from pipeline.demo.scenes.dataset import write_dataset
from pipeline.demo.scenes.draw import draw
from tests.pipeline.demo.caption_reader import reads_as_true, scenes_and_things

VARIANTS: tuple[world.Variant, ...] = ("shapes", "digits")


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_objects_lie_inside_the_image_and_apart(variant: world.Variant) -> None:
    scenes = world.sample_scenes(world.generator(3), 300, variant, "train")
    for index in range(len(scenes)):
        for i in range(scenes.count_B[index]):
            centre, half = scenes.centre_BK2[index, i], scenes.half_BK[index, i]
            assert (centre - half >= 0).all()
            assert (centre + half <= world.IMAGE_SIZE).all()
            for j in range(i):
                gap = np.abs(centre - scenes.centre_BK2[index, j]) - half - scenes.half_BK[index, j]
                assert gap.max() > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_pixels_show_each_object_in_its_colour_where_the_scene_says(variant: world.Variant) -> None:
    rng = world.generator(4)
    scenes = world.sample_scenes(rng, 50, variant, "train")
    pixels = draw(scenes, rng).astype(int)
    for index in range(len(scenes)):
        for k, thing in enumerate(scenes.things(index)):
            half = int(scenes.half_BK[index, k])
            x, y = round(thing.x), round(thing.y)
            box = pixels[index, max(0, y - half) : y + half, max(0, x - half) : x + half].reshape(-1, 3)
            r, g, b = np.quantile(box, 0.97, axis=0)
            bright = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
            bright |= {"purple": (1, 0, 1), "cyan": (0, 1, 1), "white": (1, 1, 1)}
            for channel, lit in zip((r, g, b), bright[thing.colour], strict=True):
                assert (channel > 110) == bool(lit), (thing, r, g, b)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", language.PAIR_KINDS)
def test_captions_are_true_and_negatives_false_for_an_independent_reader(
    variant: world.Variant, kind: language.PairKind
) -> None:
    rng = world.generator(5)
    num_pairs = 0
    for things in scenes_and_things(variant):
        pair = language.hard_negative(rng, things, kind, variant)
        if pair is None:
            continue
        num_pairs += 1
        true, false = map(str, pair)
        assert reads_as_true(true, things, slack=-8), (true, things)
        assert not reads_as_true(false, things, slack=0.9), (false, things)
        if kind.startswith("swap"):
            assert sorted(true.split()) == sorted(false.split())
        else:
            one, two = true.replace(" of", ""), false.replace(" of", "")
            assert sum(a != b for a, b in zip(one.split(), two.split(), strict=True)) == 1
    assert num_pairs > 100


@pytest.mark.parametrize("variant", VARIANTS)
def test_answers_agree_with_an_independent_reader(variant: world.Variant) -> None:
    rng = world.generator(6)
    for things in scenes_and_things(variant):
        by_name = {f"{t.colour} {t.noun}": t for t in things}
        assert len(by_name) == len(things)
        if exchange := language.ask_relation(rng, things, variant):
            caption = re.sub(r"\bthe\b", "a", exchange.question.removeprefix("Is ").rstrip("?"))
            slack = -8 if exchange.answer == "yes" else 0.9
            assert reads_as_true(caption, things, slack) == (exchange.answer == "yes")
        exchange = language.ask_presence(rng, things, variant)
        asked = exchange.question.removeprefix("Is there a ").rstrip("?")
        assert (asked in by_name) == (exchange.answer == "yes")
        if exchange := language.ask_neighbour(rng, things, variant):
            said, named = re.fullmatch(r"What is (.*) the (.*)\?", exchange.question).groups()
            assert reads_as_true(f"{exchange.answer} {said} a {named}", things, slack=-8)
            for name in by_name.keys() - {named, exchange.answer.removeprefix("a ")}:
                assert not reads_as_true(f"a {name} {said} a {named}", things, slack=0.9)
        if exchange := ask_choice(rng, things, variant):
            a, b = re.fullmatch(r"Which .* A: (.*) B: (.*) Answer .*", exchange.question).groups()
            right, wrong = (a, b) if exchange.answer == "A" else (b, a)
            assert reads_as_true(right, things, slack=-8)
            assert not reads_as_true(wrong, things, slack=0.9)


def test_patch_labels_name_the_object_whose_box_lies_there() -> None:
    scenes = world.sample_scenes(world.generator(8), 100, "digits", "train")
    labels = patch_labels(scenes)
    for index in range(len(scenes)):
        for k in range(scenes.count_B[index]):
            column, row = (scenes.centre_BK2[index, k] // PATCH_SIZE).astype(int)
            at = row * GRID + column
            assert labels.kind[index, at] == len(world.SHAPES) + scenes.kind_BK[index, k]
            assert labels.colour[index, at] == scenes.colour_BK[index, k]
            assert np.allclose(labels.centre[index, at] * world.IMAGE_SIZE, scenes.centre_BK2[index, k])
    assert (labels.colour[labels.kind == NO_KIND] == -100).all()


def test_digit_drawings_of_training_and_evaluation_are_disjoint() -> None:
    used = {
        split: set(world.sample_scenes(world.generator(1), 2000, "digits", split).drawing_BK.ravel())
        for split in ("train", "heldout")
    }
    assert used["train"] & used["heldout"] == set()


# -- The data set on disk


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_arguments_write_equal_bytes_and_another_seed_others(tmp_path: Path, variant: world.Variant) -> None:
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        write_dataset(tmp_path / name, num_images=20, seed=seed, variant=variant, num_pairs=4)
    one, two, other = (digest(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert not set(one.values()) & set(other.values())


def test_a_longer_data_set_begins_with_the_shorter_one(tmp_path: Path) -> None:
    for name, num_images in (("short", 5), ("long", 9)):
        write_dataset(tmp_path / name, num_images, seed=1, num_pairs=1)
    short, long = (json.loads((tmp_path / name / "captions.json").read_text()) for name in ("short", "long"))
    assert long[: len(short)] == short


def test_the_layout_is_that_of_llava_and_sugarcrepe(tmp_path: Path) -> None:
    report = write_dataset(tmp_path, num_images=60, seed=0, num_pairs=6)
    train = json.loads((tmp_path / "train.json").read_text())
    assert len(train) == report.num_conversations
    assert len({sample["id"] for sample in train}) == len(train)
    num_turns = []
    for sample in train:
        turns = sample["conversations"]
        num_turns.append(len(turns) // 2)
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        marks = [turn["value"].count("<image>") for turn in turns]
        if "image" in sample:
            assert marks == [1] + [0] * (len(turns) - 1)
            assert turns[0]["value"].startswith("<image>\n")
            with Image.open(tmp_path / sample["image"]) as image:
                assert image.size == (world.IMAGE_SIZE, world.IMAGE_SIZE)
        else:
            assert sum(marks) == 0
    assert 0 < sum("image" not in sample for sample in train) == report.num_text_only
    assert max(num_turns) > 1
    captions = json.loads((tmp_path / "captions.json").read_text())
    assert len(captions) == report.num_images == 60
    for kind in language.PAIR_KINDS:
        pairs = json.loads((tmp_path / "pairs" / f"{kind}.json").read_text())
        assert list(pairs) == [str(number) for number in range(6)]
        for entry in pairs.values():
            assert set(entry) == {"filename", "caption", "negative_caption"}
            assert (tmp_path / "pairs" / "images" / entry["filename"]).exists()


def test_no_training_image_is_a_held_out_image(tmp_path: Path) -> None:
    write_dataset(tmp_path, num_images=200, seed=0, num_pairs=20)
    train = {hashlib.sha256(p.read_bytes()).digest() for p in (tmp_path / "images").iterdir()}
    held_out = {hashlib.sha256(p.read_bytes()).digest() for p in (tmp_path / "pairs" / "images").iterdir()}
    assert len(train) == 200
    assert len(held_out) == 100
    assert not train & held_out


def test_a_second_data_set_is_not_written_over_the_first(tmp_path: Path) -> None:
    write_dataset(tmp_path, num_images=1, seed=0, num_pairs=1)
    with pytest.raises(FileExistsError, match="name a new folder"):
        write_dataset(tmp_path, num_images=1, seed=0, num_pairs=1)
