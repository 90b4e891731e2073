"""The rules of a LLaVA conversation, for packing and for encoding alike."""

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

from stages.unusable_sample import Reason, UnusableSample

PLACEHOLDER: Final = "<image>"
"""Stands for an image in a LLaVA conversation, whatever the processor's own image token is."""

Role = Literal["human", "gpt", "system"]

ROLES: Final[dict[str, Role]] = {
    "human": "human",
    "user": "human",
    "gpt": "gpt",
    "assistant": "gpt",
    "bard": "gpt",
    "bing": "gpt",
    "chatgpt": "gpt",
    "model": "gpt",
    "system": "system",
}
"""LLaVA writes human and gpt, chat formats user and assistant, ShareGPT some model's name, in any case."""


class Turn(NamedTuple):
    """One turn of a conversation."""

    role: Role
    text: str


def parse_turns(found: object) -> tuple[Turn, ...]:
    """The turns of `conversations`: an optional system turn, then human and gpt in alternation.

    Raises:
        UnusableSample: If a turn is malformed or not in order.
    """
    if not isinstance(found, list | tuple) or not found:
        raise UnusableSample("empty_conversation", f"conversations is {shorten(found)}, expected turns")
    turns = tuple(_parse_turn(index, turn) for index, turn in enumerate(found))
    check_order(turns)
    return turns


def role_of(found: object, index: int) -> Role:
    """The role of turn `index`.

    Raises:
        UnusableSample: If there is no such role.
    """
    role = ROLES.get(found.lower()) if isinstance(found, str) else None
    if role is None:
        raise UnusableSample("unknown_role", f"turn {index} is from {shorten(found)}, expected human or gpt")
    return role


def check_order(turns: tuple[Turn, ...]) -> None:
    """Refuses turns but an optional system turn, then human and gpt in alternation.

    Raises:
        UnusableSample: If they are others.
    """
    first = first_question(turns)
    for index, turn in enumerate(turns[first:], first):
        wanted = ("human", "gpt")[(index - first) % 2]
        if turn.role != wanted:
            raise UnusableSample("wrong_turn_order", f"turn {index} is {turn.role}, expected {wanted}")
    if len(turns) == first:
        what = "a system turn" if first else "an answer"
        raise UnusableSample("empty_conversation", f"there is {what} and nothing after it")


def check_complete(turns: tuple[Turn, ...]) -> None:
    """Refuses a conversation with an empty turn, or one whose last question has no answer.

    Raises:
        UnusableSample: If it is one.
    """
    for index, (role, text) in enumerate(turns):
        if role != "system" and not text.strip():
            what: Reason = "answer_missing" if role == "gpt" else "question_missing"
            raise UnusableSample(what, f"turn {index} ({role}) is empty")
    if turns[-1].role != "gpt":
        raise UnusableSample("answer_missing", f"the last of {len(turns)} turns is human, expected an answer")


def check_placeholders(num_placeholders: int, num_images: int, where: str) -> None:
    """Refuses images without a placeholder, and placeholders without an image.

    Raises:
        UnusableSample: If the numbers differ; the message says `where` placeholders were looked for.
    """
    if num_placeholders != num_images:
        raise UnusableSample(
            "placeholder_without_image" if num_placeholders > num_images else "image_without_placeholder",
            f"{num_placeholders} {PLACEHOLDER} in {where}, {num_images} images",
        )


def check_images_asked_about(turns: tuple[Turn, ...], num_images: int) -> None:
    """Refuses a conversation whose questions do not name each of its images once; without images, text is text.

    Raises:
        UnusableSample: If it does not, or if an answer or the system turn names one.
    """
    asked = sum(text.count(PLACEHOLDER) for role, text in turns if role == "human")
    elsewhere = sum(text.count(PLACEHOLDER) for role, text in turns if role != "human")
    if num_images and elsewhere:
        raise UnusableSample("placeholder_misplaced", f"{elsewhere} {PLACEHOLDER} outside the human turns")
    if num_images:
        check_placeholders(asked, num_images, "the human turns")


def first_question(turns: Sequence[Turn]) -> int:
    """Index of the first turn that is not the system's."""
    return int(bool(turns) and turns[0].role == "system")


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold the text: JSON may escape half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shorten(found: object) -> str:
    """What was found, for a message: ASCII, at most 80 characters."""
    try:
        text = ascii(found)
    except RecursionError:
        text = f"a {type(found).__name__} that is nested too deep"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _parse_turn(index: int, found: object) -> Turn:
    if not isinstance(found, dict):
        raise UnusableSample("bad_turn", f"turn {index} is {shorten(found)}, expected an object")
    role, text = role_of(found.get("from"), index), found.get("value")
    if not isinstance(text, str):
        raise UnusableSample("bad_turn", f"turn {index} has value {shorten(text)}, expected a string")
    if not is_unicode(text):
        raise UnusableSample("not_utf8", f"turn {index} holds half of a surrogate pair")
    return Turn(role, text)
