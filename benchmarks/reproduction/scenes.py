"""Pictures of the miniature: 12 x 12 cells of 8 pixels, six objects of one cell, clutter, and what is asked.

Shape letters are those of docs/architecture.md: B pictures, N cells (image tokens) in reading order, R questions of a
picture, each with one answer row.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GRID, CELL = 12, 8
NUM_CELLS = GRID * GRID
IMAGE_SIZE = GRID * CELL
COLOURS = {
    "red": (0.85, 0.1, 0.1), "green": (0.1, 0.65, 0.15), "blue": (0.15, 0.25, 0.9), "yellow": (0.9, 0.85, 0.1),
    "purple": (0.6, 0.15, 0.7), "orange": (0.95, 0.55, 0.1), "cyan": (0.1, 0.75, 0.8), "black": (0.08, 0.08, 0.08),
}  # fmt: skip
SHAPES = {
    "square": ("######", "######", "######", "######", "######", "######"),
    "ring": ("######", "#....#", "#....#", "#....#", "#....#", "######"),
    "cross": ("..##..", "..##..", "######", "######", "..##..", "..##.."),
    "saltire": ("##..##", ".####.", "..##..", "..##..", ".####.", "##..##"),
    "triangle": ("..##..", "..##..", ".####.", ".####.", "######", "######"),
    "corner": ("##....", "##....", "##....", "##....", "######", "######"),
    "tee": ("######", "######", "..##..", "..##..", "..##..", "..##.."),
    "bars": ("##..##", "##..##", "##..##", "##..##", "##..##", "##..##"),
}
TEXTURES = {
    "dots": ("#..#..", "......", "..#..#", "......", "#..#..", "......"),
    "slash": ("....#.", "...#..", "..#..#", ".#..#.", "#..#..", "..#..."),
    "specks": ("..#...", "#...#.", "..#...", "....#.", ".#....", "...#.#"),
    "lines": ("######", "......", "......", "######", "......", "......"),
}
BLANK = len(SHAPES) + len(TEXTURES)
"""Kind of a cell with nothing in it; shapes come first, then textures."""
BITMAPS = np.array([[[c == "#" for c in row] for row in bits] for bits in (*SHAPES.values(), *TEXTURES.values())])

OBJECTS_IN_ROW = 3
NUM_OBJECTS = 2 * OBJECTS_IN_ROW
CLUTTER = 0.5
"""Share of the other cells that hold a texture in one of the colours."""
SPLITS = ("train", "validation", "test")

PAD, BEGIN, END, IMAGE = "<pad>", "<begin>", "<end>", "<image>"
WORDS = (PAD, BEGIN, END, IMAGE, "colour", "left", "right", "?", *COLOURS, *SHAPES)
_WORD = {word: index for index, word in enumerate(WORDS)}
_FIRST_COLOUR, _FIRST_SHAPE = _WORD["red"], _WORD["square"]
ASKED = ("colour", "left", "right", "?")
QUESTION_TOKENS = 3

_Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Scenes:
    """Pictures as cells, and their objects in reading order: the first half in the upper row."""

    kind_BN: _Ints
    """Shape, texture or `BLANK`."""
    colour_BN: _Ints
    place_B6: _Ints
    """Cell of each object."""

    def take(self, rows: _Ints) -> "Scenes":
        """Some of the pictures."""
        return Scenes(self.kind_BN[rows], self.colour_BN[rows], self.place_B6[rows])

    def __len__(self) -> int:
        return len(self.kind_BN)


@dataclass(frozen=True)
class Questions:
    """What is asked of each picture: `words ?`, one word as the answer, and a wrong word that is in the picture too."""

    asked_BR3: _Ints
    answer_BR: _Ints
    negative_BR: _Ints
    kind_R: tuple[str, ...]


def draw_scenes(split: str, seed: int, count: int) -> Scenes:
    """Pictures of a split; the generator of one split never makes those of another."""
    rng = np.random.default_rng([SPLITS.index(split), seed])
    kind_BN = np.full((count, NUM_CELLS), BLANK)
    colour_BN = rng.integers(len(COLOURS), size=kind_BN.shape)
    clutter_BN = rng.random(kind_BN.shape) < CLUTTER
    textures_BN = len(SHAPES) + rng.integers(len(TEXTURES), size=kind_BN.shape)
    kind_BN = np.where(clutter_BN, textures_BN, kind_BN)
    rows_B2 = np.sort(rng.random((count, GRID)).argsort(-1)[:, :2], -1)
    # Three of ten columns, moved apart: objects of a row never touch.
    columns = [np.sort(rng.random((count, GRID - 2)).argsort(-1)[:, :OBJECTS_IN_ROW], -1) for _ in range(2)]
    columns_B23 = np.stack(columns, 1) + np.arange(OBJECTS_IN_ROW)
    place_B6 = (rows_B2[:, :, None] * GRID + columns_B23).reshape(count, NUM_OBJECTS)
    shapes_B6 = rng.random((count, len(SHAPES))).argsort(-1)[:, :NUM_OBJECTS]
    np.put_along_axis(kind_BN, place_B6, shapes_B6, 1)
    return Scenes(kind_BN, colour_BN, place_B6)


def render(scenes: Scenes, rng: np.random.Generator) -> NDArray[np.uint8]:
    """`[B, 96, 96, 3]`: each mark moved by up to two pixels, its colour and every pixel a little off."""
    count = len(scenes)
    padded = np.zeros((len(BITMAPS) + 1, CELL, CELL), dtype=bool)
    padded[:-1, :6, :6] = BITMAPS
    shifts = np.stack([np.roll(padded, (dy, dx), (1, 2)) for dy in range(3) for dx in range(3)])
    mark = shifts[rng.integers(9, size=scenes.kind_BN.shape), scenes.kind_BN][..., None]
    colours = np.array(list(COLOURS.values()))[scenes.colour_BN][:, :, None, None]
    colours = colours * rng.uniform(0.8, 1.1, size=(count, NUM_CELLS, 1, 1, 1))
    cells = np.where(mark, colours, 0.9) + rng.normal(0, 0.04, size=(count, NUM_CELLS, CELL, CELL, 3))
    pixels = cells.reshape(count, GRID, GRID, CELL, CELL, 3).transpose(0, 1, 3, 2, 4, 5)
    return (pixels.reshape(count, IMAGE_SIZE, IMAGE_SIZE, 3).clip(0, 1) * 255).round().astype(np.uint8)


def ask(scenes: Scenes) -> Questions:
    """The colour of each object, and the neighbours in its row.

    The wrong word of a colour is that of another object, or any other colour if all objects share it. That of a
    neighbour is the third object of the row: who knows what is there, but not where, is right half of the time.
    """
    shape_B6 = np.take_along_axis(scenes.kind_BN, scenes.place_B6, 1)
    colour_B6 = np.take_along_axis(scenes.colour_BN, scenes.place_B6, 1)
    asked: list[tuple[_Ints, _Ints, _Ints]] = []
    kinds: list[str] = []

    def add(kind: str, word: str, about: int, answer_B: _Ints, negative_B: _Ints) -> None:
        about_B = _FIRST_SHAPE + shape_B6[:, about]
        constant = np.full_like(about_B, _WORD[word])
        asked.append((np.stack([constant, about_B, np.full_like(about_B, _WORD["?"])], 1), answer_B, negative_B))
        kinds.append(kind)

    for k in range(NUM_OBJECTS):
        own_B, others = colour_B6[:, k], np.roll(colour_B6, -1 - k, 1)[:, :-1]
        differs = others != own_B[:, None]
        first_B = np.take_along_axis(others, differs.argmax(1)[:, None], 1)[:, 0]
        wrong_B = np.where(differs.any(1), first_B, (own_B + 1) % len(COLOURS))
        add("colour", "colour", k, _FIRST_COLOUR + own_B, _FIRST_COLOUR + wrong_B)
    word_B6 = _FIRST_SHAPE + shape_B6
    for first in range(0, NUM_OBJECTS, OBJECTS_IN_ROW):
        a, b, c = first, first + 1, first + 2
        for word, about, answer, wrong in (
            ("left", b, a, c), ("right", b, c, a), ("right", a, b, c), ("left", c, b, a),
        ):  # fmt: skip
            add("middle" if about == b else "end", word, about, word_B6[:, answer], word_B6[:, wrong])
    asked_BR3, answer_BR, negative_BR = (np.stack(part, 1) for part in zip(*asked, strict=True))
    return Questions(asked_BR3, answer_BR, negative_BR, tuple(kinds))
