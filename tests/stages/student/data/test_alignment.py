"""Which answer rows of two tokenizers are compared, and which tokens are the same."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from pipeline.demo.assets import TEACHER
from stages.checkpoints.processors import load_processor
from stages.student.data.alignment import ComparedRows, TokenAlignment
from stages.student.data.token_names import END, TokenNames, token_names
from stages.student.losses.across_tokenizers import SPACINGS
from tests import real_models
from tests.checkpoints import make_foreign_lm
from tests.stages.student.data.test_token_names import byte_level, sentencepiece_like

Pieces = list[bytes | str | None]
SAME, OURS, THEIRS = range(3)


def compared(teacher: list[Pieces], student: list[Pieces]) -> list[tuple[int, int, int]]:
    """Of conversations whose answers have these tokens, with a question before each."""

    def told(answers: list[Pieces]) -> tuple[TokenNames, torch.Tensor, torch.Tensor]:
        names: Pieces = ["question"]
        mask = [False]
        for answer in answers:
            names += [*answer, "question"]
            mask += [True] * len(answer) + [False]
        return tuple(names), torch.arange(len(names)), torch.tensor(mask)

    (ours, *stored), (theirs, *read) = told(teacher), told(student)
    found = TokenAlignment(ours, theirs).compared_rows(*stored, *read)
    return list(zip(*(column.tolist() for column in vars(found).values()), strict=True))


def test_rows_are_compared_where_both_have_read_the_same_text_the_end_included() -> None:
    teacher: Pieces = [b"a ", b"red", b" squ", b"are", END]
    student: Pieces = [b"a", b" r", b"ed", b" square", END]
    assert compared([teacher], [student]) == [(0, 0, SAME), (2, 3, SAME), (4, 4, SAME)]
    assert compared([teacher], [teacher]) == [(row, row, SAME) for row in range(5)]


def test_answers_are_paired_in_order_and_one_more_of_either_is_left_out() -> None:
    one: list[Pieces] = [[b"yes", END], [b"n", b"o", END], [b"it is", END]]
    other: list[Pieces] = [[b"y", b"es", END], [b"no", END]]
    assert compared(one, other) == [(0, 0, 0), (1, 2, 0), (2, 3, 0), (4, 4, 0)]
    assert compared(other, one) == [(0, 0, 0), (2, 1, 0), (3, 2, 0), (4, 4, 0)]


def test_from_where_the_texts_differ_no_row_is_compared_until_the_next_answer() -> None:
    teacher: list[Pieces] = [[b"a", b" 1/2", b" cup", END], [b"ok", END]]
    student: list[Pieces] = [[b"a", " ½".encode(), b" cup", END], [b"ok", END]]
    assert compared(teacher, student) == [(0, 0, 0), (1, 1, 0), (4, 4, 0), (5, 5, 0)]


def test_an_answer_that_one_side_was_cut_in_is_compared_up_to_there() -> None:
    assert compared([[b"a", b" b", b" c", END]], [[b"a", b" b"]]) == [(0, 0, 0), (1, 1, 0)]


def test_white_space_before_an_answer_is_the_templates() -> None:
    bare: Pieces = [b"a", b"b", END]
    assert compared([[b" a", b"b", END]], [bare]) == [(0, 0, OURS), (1, 1, SAME), (2, 2, SAME)]
    assert compared([bare], [[b" a", b"b", END]]) == [(0, 0, THEIRS), (1, 1, SAME), (2, 2, SAME)]
    assert compared([[b" a", b"b", END]], [[b" a", b"b", END]])[0] == (0, 0, SAME)
    # A token of its own is read before the first word.
    assert compared([[b" ", b"a", b"b", END]], [bare]) == [(1, 0, SAME), (2, 1, SAME), (3, 2, SAME)]
    assert compared([[b"\n", b" a", b"b", END]], [bare])[0] == (1, 0, OURS)
    # No token of one is one of the other there.
    assert compared([[b"\na", b"b", END]], [[b" a", b"b", END]]) == [(1, 1, SAME), (2, 2, SAME)]


def test_tokens_that_split_a_character_are_compared_byte_by_byte() -> None:
    teacher: Pieces = ["é".encode()[:1], "é".encode()[1:], END]
    assert compared([teacher], [[*teacher]]) == [(0, 0, 0), (1, 1, 0), (2, 2, 0)]
    assert compared([teacher], [["é".encode(), END]]) == [(0, 0, 0), (2, 1, 0)]


def test_behind_a_token_of_unknown_text_nothing_is_compared() -> None:
    teacher: list[Pieces] = [[b"a", "<unk>", b" b", END], [b"c", END]]
    assert compared(teacher, [[b"a", "雪".encode(), b" b", END], [b"c", END]]) == [
        (0, 0, 0),
        (1, 1, 0),
        (4, 4, 0),
        (5, 5, 0),
    ]
    assert compared([[None, b" b", END]], [[b"a", b" b", END]]) == []


def test_no_answer_gives_no_rows() -> None:
    assert compared([], [[b"a", END]]) == []
    assert compared([[b"x", END]], [["<unk>"]]) == compared([[b"x", END]], [[b"y", END]]) == []
    assert compared([[END]], [[END]]) == [(0, 0, 0)]


def test_rows_of_a_batch_are_counted_through_it() -> None:
    parts = [
        ComparedRows(*(torch.tensor(column) for column in columns))
        for columns in (([0, 3], [1, 2], [0, 1]), ([2], [0], [2]))
    ]
    joined = ComparedRows.joined(parts, [4, 5])
    assert [column.tolist() for column in vars(joined).values()] == [[0, 1, 2], [1, 2, 4], [0, 1, 2]]
    assert len(ComparedRows.joined([], [])) == 0


def test_tokens_are_the_same_by_their_text_whatever_marks_a_word() -> None:
    ours, theirs = sentencepiece_like(), byte_level()
    ends = [tokenizer.token_to_id("<eos>") for tokenizer in (ours, theirs)]
    alignment = TokenAlignment(*(token_names(one, end, "it") for one, end in zip((ours, theirs), ends, strict=True)))
    shared = alignment.shared_tokens(ours.get_vocab_size() + 3, theirs.get_vocab_size())

    def student_of(token: str, spacing: int = SAME) -> str | None:
        place = int(shared.places_V[spacing][ours.token_to_id(token)])
        return None if place < 0 else theirs.id_to_token(int(shared.student_ids[spacing][place]))

    assert student_of("\u2581") == "Ġ"
    assert student_of("ed") == "ed"
    assert student_of("<0xF0>") == "ð"
    assert student_of("<eos>") == "<eos>"
    assert student_of("<unk>") is student_of("<s>") is None
    assert student_of("\u2581r") == "Ġr"
    assert student_of("\u2581red") is None
    assert student_of("\u2581r", OURS) == "r"
    assert student_of("r", OURS) is None
    assert student_of("<eos>", OURS) == student_of("<eos>", THEIRS) == "<eos>"
    assert shared.places_V[0][-3:].tolist() == [-1, -1, -1]
    assert shared.num_shared == sum(student_of(token) is not None for token in ours.get_vocab())


def test_ids_past_the_students_logits_are_no_tokens_of_it() -> None:
    alignment = TokenAlignment((b"a", b"b", None), (b"b", b"a", b"c"))
    assert alignment.shared_tokens(3, 3).places_V[0].tolist() == [1, 0, -1]
    shared = alignment.shared_tokens(3, 1)
    assert (shared.places_V[0].tolist(), shared.student_ids[0].tolist()) == ([-1, 0, -1], [0])


TEXTS = ("The naïve owl 🦉 sat; it cost 3 €.", "Zwei rote Quadrate,\n\n  ein Kreis: 雪!", "def f(x):\n    return x")


def test_real_tokenizers_meet_where_the_makers_rules_say(tmp_path: Path) -> None:
    made = real_models.sentencepiece(tmp_path / "one"), real_models.tiktoken_like(tmp_path / "other")
    alignment = TokenAlignment(
        *(token_names(Tokenizer.from_file(str(one.folder / "tokenizer.json")), None, "it") for one in made)
    )
    for text in TEXTS:
        pieces = [one.rule(text, True) for one in made]
        sides = [(torch.tensor([n for n, _ in found]), torch.ones(len(found), dtype=torch.bool)) for found in pieces]
        found = alignment.compared_rows(*sides[0], *sides[1])
        pairs = list(zip(found.teacher_A.tolist(), found.student_A.tolist(), strict=True))
        starts = [[sum(size for _, size in side[:row]) for row in range(len(side))] for side in pieces]
        assert pairs == [(starts[0].index(at), starts[1].index(at)) for at in sorted({*starts[0]} & {*starts[1]})]
        assert found.spacing_A.tolist() == [OURS, *[SAME] * (len(pairs) - 1)]
        assert len(pairs) > 4
    shared = alignment.shared_tokens(len(alignment.teacher), len(alignment.student))
    assert shared.num_shared > 3000
    assert SPACINGS[OURS] == (b" ", b"")


def test_the_bundled_teachers_words_meet_the_tokens_of_a_byte_level_student(tmp_path: Path) -> None:
    teacher = load_processor(TEACHER).tokenizer
    student = AutoTokenizer.from_pretrained(make_foreign_lm(tmp_path / "lm"))
    alignment = TokenAlignment(
        *(token_names(one.backend_tokenizer, one.eos_token_id, "it") for one in (teacher, student))
    )
    text = "a red square left of a green circle"
    sides = [
        torch.tensor([*one(text, add_special_tokens=False)["input_ids"], one.eos_token_id])
        for one in (teacher, student)
    ]
    masks = [torch.ones(len(side), dtype=torch.bool) for side in sides]
    found = alignment.compared_rows(sides[0], masks[0], sides[1], masks[1])
    # Each of its tokens is a word with the space before it; the student splits words further.
    assert found.teacher_A.tolist() == list(range(9))
    assert found.spacing_A.tolist() == [OURS, *[SAME] * 8]
    assert int(found.student_A[-1]) == len(sides[1]) - 1 > 8
    shared = alignment.shared_tokens(len(alignment.teacher), len(alignment.student))
    (one,) = teacher(" a", add_special_tokens=False)["input_ids"][-1:]
    assert student.convert_ids_to_tokens(int(shared.student_ids[OURS][shared.places_V[OURS][one]])) == "a"
