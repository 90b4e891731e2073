"""Whether a student's token ids mean what the target store's do."""

from pathlib import Path

from tokenizers import Tokenizer
from transformers import ProcessorMixin

from storage.errors import UserError


def tokenizer_differences(processor: ProcessorMixin, student_folder: Path) -> list[str]:
    """What stored token ids mean to a student that they do not mean to the teacher; empty when all mean the same.

    Ids that only one side has are fine; those that the data holds are checked against the student's vocabulary when
    they are used, and those it lacks are left out of the logit loss. How a text is split into tokens may differ, since
    no text is split again.

    Args:
        processor: the teacher's, from the target store.
        student_folder: checkpoint of the student or of its decoder, with `tokenizer.json`.

    Returns:
        A line each for vocabulary entries and added tokens, with an example.

    Raises:
        UserError: there is no `tokenizer.json` to compare with, or it is damaged.
    """
    file = student_folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(
            f"{student_folder} has no tokenizer.json, so nothing says whether its token ids are the teacher's; "
            "save the fast tokenizer of that model into it"
        )
    teacher = processor.tokenizer
    # The image's placeholder is replaced by features and padding is masked: no student reads their ids.
    unread = {getattr(processor, "image_token_id", None), teacher.pad_token_id} - {teacher.eos_token_id}
    return token_differences(teacher.backend_tokenizer, _read(file), unread)


def _read(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(file))
    # It has no class of its own for what it cannot read.
    except Exception as error:
        raise UserError(f"{file} cannot be read as a fast tokenizer ({error}); fetch or save it again") from error


def other_tokenizer(student_folder: Path, differences: list[str]) -> UserError:
    """Why a student with these differences cannot learn the teacher's answer distributions, and the ways out."""
    return UserError(
        f"the tokenizer of {student_folder} is not the teacher's; it differs in:\n"
        + "\n".join(f"  {line}" for line in differences)
        + "\nThe teacher's answer distributions are over its own tokens: choose a student of the teacher's family, "
        "extract with a teacher of the student's, or set kd_weight to 0 in every stage that is trained "
        "(--set train.dpt.kd_weight=0 and so on): the student then reads its own tokens, and learns from the answers "
        "and the teacher's attention"
    )


def token_differences(teacher: Tokenizer, student: Tokenizer, unread: "set[int | None]") -> list[str]:
    """A line each for vocabulary entries and for added tokens that have one id in the teacher, another in the student.

    Args:
        teacher: with its added tokens.
        student: likewise.
        unread: ids of the teacher's that need not agree.
    """
    teacher_ids, student_ids = teacher.get_vocab(), student.get_vocab()
    student_tokens = {number: token for token, number in student_ids.items()}
    added = {str(token.content) for t in (teacher, student) for token in t.get_added_tokens_decoder().values()}
    found: dict[str, list[str]] = {"vocabulary entries": [], "added tokens": []}
    for token, number in sorted(teacher_ids.items(), key=lambda item: item[1]):
        there = student_tokens.get(number)
        if number in unread or there == token or (there is None and token not in student_ids):
            continue
        meant = f"is {there!r} to the student" if there is not None else f"the student has at {student_ids[token]}"
        kind = "added tokens" if {token, there} & added else "vocabulary entries"
        found[kind].append(f"id {number} is {token!r} to the teacher, {meant}")
    return [
        f"{kind}: {len(lines)} of {len(teacher_ids)} ids differ, such as {lines[0]}"
        for kind, lines in found.items()
        if lines
    ]
