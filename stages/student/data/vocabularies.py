"""Two vocabularies side by side: which token ids mean something else to a student than to its teacher."""

from collections.abc import Set
from pathlib import Path

from tokenizers import Tokenizer

from stages.checkpoints.processor_files import TOKENIZER
from stages.student.student_kind import without_tokenizer
from storage.errors import UserError

_MOST_UNREAD = 2
"""Ids that no student reads, though both sides have them: the image token's and that of padding."""


def read_vocabulary(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint, as its file says it.

    Raises:
        UserError: If there is no `tokenizer.json`, or it is damaged.
    """
    file = folder / TOKENIZER
    if not file.is_file():
        raise without_tokenizer(folder)
    try:
        return Tokenizer.from_file(str(file))
    # The library raises a bare Exception for a file that it cannot read.
    except Exception as error:
        raise UserError(f"{file} cannot be read as a fast tokenizer ({error}); fetch or save it again") from error


def vocabulary_differences(teacher: Tokenizer, student: Tokenizer, unread: Set[int | None]) -> dict[str, list[str]]:
    """A line for each id that both sides have, or both have a token of, and that means something else to either.

    Returns:
        `vocabulary entries` and `added tokens`, each with its lines; ids of `unread` are none of them.
    """
    teacher_ids, student_ids = teacher.get_vocab(), student.get_vocab()
    student_tokens = {number: token for token, number in student_ids.items()}
    added = {str(token.content) for one in (teacher, student) for token in one.get_added_tokens_decoder().values()}
    found: dict[str, list[str]] = {"vocabulary entries": [], "added tokens": []}
    for token, number in sorted(teacher_ids.items(), key=lambda item: item[1]):
        there = student_tokens.get(number)
        if number in unread or there == token or (there is None and token not in student_ids):
            continue
        meant = f"is {there!r} to the student" if there is not None else f"the student has at {student_ids[token]}"
        kind = "added tokens" if {token, there} & added else "vocabulary entries"
        found[kind].append(f"id {number} is {token!r} to the teacher, {meant}")
    return found


def summary(differences: dict[str, list[str]], teacher: Tokenizer) -> list[str]:
    """A line for each kind of difference, with an example; empty if there is none."""
    num_ids = len(teacher.get_vocab())
    return [
        f"{kind}: {len(lines)} of {num_ids} ids differ, such as {lines[0]}"
        for kind, lines in differences.items()
        if lines
    ]


def refuse_other_vocabulary(teacher: Path, student: Path) -> None:
    """Refuses a student whose vocabulary is another one, whatever a few special tokens are.

    Raises:
        UserError: If it is, or as `read_vocabulary`.
    """
    its, own = read_vocabulary(teacher), read_vocabulary(student)
    found = vocabulary_differences(its, own, frozenset())
    if sum(map(len, found.values())) > _MOST_UNREAD:
        raise other_tokenizer(student, summary(found, its))


def other_tokenizer(student_folder: Path, differences: list[str]) -> UserError:
    """The refusal of a student with these differences that is to learn the teacher's answer distributions."""
    return UserError(
        f"the tokenizer of {student_folder} is not the teacher's; it differs in:\n"
        + "\n".join(f"  {line}" for line in differences)
        + "\nThe teacher's answer distributions are over its own tokens: choose a student of the teacher's family, "
        "extract with a teacher of the student's, set kd_alignment to uld or shared in every stage with a kd_weight "
        "(--set train.dpt.kd_alignment=uld and so on), which compares them across tokenizers, or set kd_weight to 0 in "
        "every stage that is trained (--set train.dpt.kd_weight=0 and so on): the student then reads its own tokens, "
        "and learns from the answers and the teacher's attention"
    )
