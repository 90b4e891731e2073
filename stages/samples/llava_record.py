"""What a record must look like to become a sample, and the one form it is stored in."""

from dataclasses import dataclass
from pathlib import Path

from stages.conversations.turns import (
    PLACEHOLDER,
    Turn,
    check_complete,
    check_images_asked_about,
    is_unicode,
    shorten,
)
from stages.samples.layouts.conversation import RecordReader
from stages.samples.layouts.images import ImageRef
from stages.unusable_sample import UnusableSample


@dataclass(frozen=True, slots=True)
class LlavaRecord:
    """A record whose JSON can be used; its images are not read yet."""

    id: str
    """The record's own id, or its ordinal when it has none."""
    has_own_id: bool
    """Whether the file gave the id."""
    images: tuple[ImageRef, ...]
    """In the order of the placeholders; empty for text only."""
    turns: tuple[Turn, ...]
    """At most one system turn, then human and gpt in alternation, ending with gpt."""
    unread: frozenset[str] = frozenset()
    """Keys that nothing reads and that change nothing of what is learned."""
    dropped_answer: bool = False
    """Whether an answer before the first question was left out."""

    @property
    def image_names(self) -> tuple[str, ...]:
        """What tells the images apart: records with equal names are about the same images."""
        return tuple(image.name for image in self.images)

    @property
    def has_placeholder_as_text(self) -> bool:
        """Whether it has no images and yet the word that stands for one."""
        return not self.images and any(PLACEHOLDER in text for _, text in self.turns)

    def as_json(self) -> dict[str, object]:
        """The stored form: LLaVA's own, without keys that LLaVA does not define."""
        names = self.image_names
        images = {"image": names[0] if len(names) == 1 else list(names)} if names else {}
        turns = [{"from": role, "value": text} for role, text in self.turns]
        return {"id": self.id, **images, "conversations": turns}


def record_id(value: object, ordinal: int) -> str | None:
    """The id the ledger names a record by: its own, else its ordinal; None when its own is unusable."""
    if not isinstance(value, dict):
        return None
    found = value.get("id")
    if found is None or found == "":
        return str(ordinal)
    if isinstance(found, bool) or not isinstance(found, str | int) or not is_unicode(str(found)):
        return None
    return str(found)


def parse_record(value: object, ordinal: int, root: Path | None = None) -> LlavaRecord:
    """Validate one record of any layout that is read.

    Args:
        value: The record as its file has it.
        ordinal: Its number in the file, from 0.
        root: The image folder; absolute paths of images may lie in it.

    Raises:
        UnusableSample: If `value` breaks a rule; with the first.
    """
    if isinstance(value, UnusableSample):
        raise value
    if not isinstance(value, dict):
        raise UnusableSample("not_an_object", f"found a {type(value).__name__}, expected an object")
    found_id = record_id(value, ordinal)
    if found_id is None:
        raise UnusableSample("bad_id", f"id is {shorten(value['id'])}, expected a string or an integer")
    reader = RecordReader(value, root)
    turns = reader.turns()
    check_complete(turns)
    check_images_asked_about(turns, len(reader.images))
    return LlavaRecord(
        id=found_id,
        has_own_id=value.get("id") not in (None, ""),
        images=tuple(reader.images),
        turns=turns,
        unread=reader.unread,
        dropped_answer=reader.dropped_answer,
    )
