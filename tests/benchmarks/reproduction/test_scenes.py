import numpy as np
import pytest

from benchmarks.reproduction.scenes import (
    BLANK,
    GRID,
    IMAGE_SIZE,
    NUM_CELLS,
    NUM_OBJECTS,
    OBJECTS_IN_ROW,
    SHAPES,
    WORDS,
    Questions,
    Scenes,
    ask,
    draw_scenes,
    render,
)

SCENES = draw_scenes("train", 0, 2000)


@pytest.fixture(scope="module")
def questions() -> Questions:
    return ask(SCENES)


def neighbour(scenes: Scenes, picture: int, shape: str, word: str) -> str | None:
    """By walking from cell to cell until the next object."""
    (cell,) = np.flatnonzero(scenes.kind_BN[picture] == list(SHAPES).index(shape))
    step = 1 if word == "right" else -1
    at = int(cell) + step
    while at // GRID == cell // GRID and at >= 0:
        if scenes.kind_BN[picture, at] < len(SHAPES):
            return list(SHAPES)[scenes.kind_BN[picture, at]]
        at += step
    return None


def test_objects_are_six_of_different_shapes_three_in_each_of_two_rows_and_touch_no_other() -> None:
    assert ((SCENES.kind_BN < len(SHAPES)).sum(1) == NUM_OBJECTS).all()
    shapes_B6 = np.take_along_axis(SCENES.kind_BN, SCENES.place_B6, 1)
    assert (np.diff(np.sort(shapes_B6, 1), axis=1) > 0).all()
    row_B23, column_B23 = (x.reshape(-1, 2, OBJECTS_IN_ROW) for x in (SCENES.place_B6 // GRID, SCENES.place_B6 % GRID))
    assert (row_B23 == row_B23[:, :, :1]).all()
    assert (row_B23[:, 0] < row_B23[:, 1]).all()
    assert (np.diff(column_B23, axis=2) >= 2).all()


def test_every_answer_is_what_a_walk_through_the_picture_finds(questions: Questions) -> None:
    for picture in range(50):
        for (word, about, mark), answer in zip(questions.asked_BR3[picture], questions.answer_BR[picture], strict=True):
            assert WORDS[mark] == "?"
            if WORDS[word] != "colour":
                assert neighbour(SCENES, picture, WORDS[about], WORDS[word]) == WORDS[answer]
                continue
            (cell,) = np.flatnonzero(SCENES.kind_BN[picture] == list(SHAPES).index(WORDS[about]))
            assert WORDS[answer] == WORDS[WORDS.index("red") + SCENES.colour_BN[picture, cell]]


def test_a_wrong_word_is_never_the_answer_and_is_in_the_picture(questions: Questions) -> None:
    assert (questions.negative_BR != questions.answer_BR).all()
    relation_R = np.array(questions.kind_R) != "colour"
    shapes_B6 = np.take_along_axis(SCENES.kind_BN, SCENES.place_B6, 1) + WORDS.index("square")
    in_picture = questions.negative_BR[:, relation_R, None] == shapes_B6[:, None, :]
    assert in_picture.any(2).all()


def test_who_sees_only_the_words_of_a_question_is_at_chance(questions: Questions) -> None:
    """The best answer by words alone, fitted on these very pictures, beats the wrong word half of the time."""
    for kind in dict.fromkeys(questions.kind_R):
        of_kind_R = np.array(questions.kind_R) == kind
        asked = questions.asked_BR3[:, of_kind_R].reshape(-1, 3)
        answer, negative = (x[:, of_kind_R].ravel() for x in (questions.answer_BR, questions.negative_BR))
        prior = np.ones((len(WORDS), len(WORDS), len(WORDS)))
        np.add.at(prior, (asked[:, 0], asked[:, 1], answer), 1)
        score, against = (prior[asked[:, 0], asked[:, 1], word] for word in (answer, negative))
        assert ((score > against) + 0.5 * (score == against)).mean() < 0.54, kind


def test_who_knows_the_row_but_not_the_order_is_at_chance_about_the_middle(questions: Questions) -> None:
    """A mirrored picture has the same objects in the same rows, and every answer about the middle is the other one."""
    place_B6 = SCENES.place_B6.reshape(-1, 2, OBJECTS_IN_ROW)[:, :, ::-1].reshape(-1, NUM_OBJECTS)
    kind_BN, colour_BN = SCENES.kind_BN.copy(), SCENES.colour_BN.copy()
    for cells_BN, of in ((kind_BN, SCENES.kind_BN), (colour_BN, SCENES.colour_BN)):
        np.put_along_axis(cells_BN, SCENES.place_B6, np.take_along_axis(of, place_B6, 1), 1)
    mirrored = ask(Scenes(kind_BN, colour_BN, SCENES.place_B6))
    middle_R = np.array(questions.kind_R) == "middle"
    assert (mirrored.asked_BR3[:, middle_R] == questions.asked_BR3[:, middle_R]).all()
    assert (mirrored.answer_BR[:, middle_R] == questions.negative_BR[:, middle_R]).all()


def test_splits_and_seeds_draw_different_pictures_and_each_draws_the_same_again() -> None:
    drawn = {
        (split, seed): draw_scenes(split, seed, 20) for split in ("train", "validation", "test") for seed in (0, 1)
    }
    pictures = [tuple(kinds) for scenes in drawn.values() for kinds in scenes.kind_BN]
    assert len(set(pictures)) == len(pictures)
    again = draw_scenes("test", 1, 20)
    assert (again.kind_BN == drawn["test", 1].kind_BN).all()


def test_a_picture_shows_a_mark_in_its_colour_in_every_cell_that_is_not_blank() -> None:
    scenes = draw_scenes("train", 3, 4)
    pixels = render(scenes, np.random.default_rng(0))
    assert pixels.shape == (4, IMAGE_SIZE, IMAGE_SIZE, 3)
    cells = pixels.reshape(4, GRID, 8, GRID, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(4, NUM_CELLS, 64, 3)
    darkest_BN = cells.min(3).min(2)
    blank_BN = scenes.kind_BN == BLANK
    assert darkest_BN[blank_BN].min() > 150
    assert darkest_BN[~blank_BN].max() < 130
