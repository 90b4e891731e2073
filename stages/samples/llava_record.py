"""What a LLaVA record must look like to become a sample, and the one form it is stored in."""

from dataclasses import dataclass
from pathlib import PurePosixPath

from stages.samples.ledger import UnusableSample

PLACEHOLDER = "<image>"

ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
"""LLaVA writes human and gpt; user and assistant, common in data made from chat formats, mean the same."""


@dataclass(frozen=True, slots=True)
class LlavaRecord:
    """A record that can be used as far as its JSON goes; its images have not been looked at."""

    id: str
    """The record's own id, or its ordinal when it has none."""
    has_own_id: bool
    """Whether the file gave the id."""
    images: tuple[str, ...]
    """Paths relative to the image folder, in the order of the placeholders; empty for text only."""
    turns: tuple[tuple[str, str], ...]
    """(role, text): at most one system turn, then human and gpt in alternation, ending with gpt."""

    def as_json(self) -> dict[str, object]:
        """The stored form: LLaVA's own, without keys that LLaVA does not define."""
        record: dict[str, object] = {"id": self.id}
        if len(self.images) == 1:
            record["image"] = self.images[0]
        elif self.images:
            record["image"] = list(self.images)
        record["conversations"] = [{"from": role, "value": text} for role, text in self.turns]
        return record


def record_id(value: object, ordinal: int) -> str | None:
    """The id the ledger names a record by: its own, else its ordinal; None when its own is unusable."""
    if not isinstance(value, dict):
        return None
    found = value.get("id")
    if found is None:
        return str(ordinal)
    if isinstance(found, bool) or not isinstance(found, str | int) or not _is_unicode(str(found)):
        return None
    return str(found)


def parse_record(value: object, ordinal: int) -> LlavaRecord:
    """Validate one record.

    Raises:
        UnusableSample: with the first rule that `value` breaks.
    """
    if not isinstance(value, dict):
        raise UnusableSample("not_an_object", f"found a {type(value).__name__}, expected an object")
    found_id = record_id(value, ordinal)
    if found_id is None:
        raise UnusableSample("bad_id", f"id is {_shorten(value['id'])}, expected a string or an integer")
    turns = _parse_turns(value.get("conversations"))
    images = _parse_images(value.get("image"))
    _check_placeholders(turns, len(images))
    has_own_id = value.get("id") is not None
    return LlavaRecord(id=found_id, has_own_id=has_own_id, images=images, turns=turns)


def _parse_turns(found: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(found, list) or not found:
        raise UnusableSample("empty_conversation", f"conversations is {_shorten(found)}, expected turns")
    turns = tuple(_parse_turn(index, turn) for index, turn in enumerate(found))
    first = _index_of_first_human(turns)
    for index, (role, text) in enumerate(turns[first:], first):
        wanted = ("human", "gpt")[(index - first) % 2]
        if role != wanted:
            raise UnusableSample("wrong_turn_order", f"turn {index} is {role}, expected {wanted}")
        if not text.strip():
            reason = "answer_missing" if role == "gpt" else "question_missing"
            raise UnusableSample(reason, f"turn {index} ({role}) is empty")
    if len(turns) == first:
        raise UnusableSample("empty_conversation", "there is a system turn and nothing after it")
    if turns[-1][0] != "gpt":
        raise UnusableSample("answer_missing", f"the last of {len(turns)} turns is human, expected an answer")
    return turns


def _index_of_first_human(turns: tuple[tuple[str, str], ...]) -> int:
    return 1 if turns[0][0] == "system" else 0


def _parse_turn(index: int, found: object) -> tuple[str, str]:
    if not isinstance(found, dict):
        raise UnusableSample("bad_turn", f"turn {index} is {_shorten(found)}, expected an object")
    role, text = found.get("from"), found.get("value")
    if not isinstance(role, str) or role not in ROLES:
        raise UnusableSample("unknown_role", f"turn {index} is from {_shorten(role)}, expected human or gpt")
    if not isinstance(text, str):
        raise UnusableSample("bad_turn", f"turn {index} has value {_shorten(text)}, expected a string")
    if not _is_unicode(text):
        raise UnusableSample("not_utf8", f"turn {index} holds half of a surrogate pair")
    return ROLES[role], text


def _parse_images(found: object) -> tuple[str, ...]:
    # Exporters write null, "" or [] for a sample without an image.
    if found is None or found in ("", []):
        return ()
    paths = found if isinstance(found, list) else [found]
    return tuple(_parse_path(path) for path in paths)


def _parse_path(found: object) -> str:
    if not isinstance(found, str) or not found.strip():
        raise UnusableSample("bad_image_field", f"image is {_shorten(found)}, expected a path or a list of paths")
    if not _is_unicode(found) or "\0" in found:
        raise UnusableSample("bad_image_field", f"image is {_shorten(found)}, which no file can be named")
    path = PurePosixPath(found)
    if path.is_absolute() or ".." in path.parts:
        raise UnusableSample("path_leaves_folder", f"{_shorten(found)} is absolute or has '..'")
    return str(path)


def _check_placeholders(turns: tuple[tuple[str, str], ...], num_images: int) -> None:
    first = turns[_index_of_first_human(turns)][1].count(PLACEHOLDER)
    elsewhere = sum(text.count(PLACEHOLDER) for _, text in turns) - first
    found = f"{num_images} images, {first} {PLACEHOLDER} in the first human turn, {elsewhere} elsewhere"
    if first > num_images or (elsewhere and not num_images):
        raise UnusableSample("placeholder_without_image", found)
    if elsewhere:
        raise UnusableSample("placeholder_misplaced", found)
    if first < num_images:
        raise UnusableSample("image_without_placeholder", found)


def _is_unicode(text: str) -> bool:
    # JSON may escape half of a surrogate pair; no tokenizer and no UTF-8 file takes it.
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shorten(found: object) -> str:
    text = ascii(found)
    return text if len(text) <= 80 else f"{text[:77]}..."
