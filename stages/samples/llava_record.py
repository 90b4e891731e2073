"""What a LLaVA record must look like to become a sample, and the one form it is stored in."""

from dataclasses import dataclass
from pathlib import PurePosixPath

from stages.conversations.turns import Turn, check_complete, check_only_first_question, is_unicode, parse_turns, shorten
from stages.unusable_sample import UnusableSample


@dataclass(frozen=True, slots=True)
class LlavaRecord:
    """A record whose JSON can be used; its images are not read yet."""

    id: str
    """The record's own id, or its ordinal when it has none."""
    has_own_id: bool
    """Whether the file gave the id."""
    images: tuple[str, ...]
    """Paths relative to the image folder, in the order of the placeholders; empty for text only."""
    turns: tuple[Turn, ...]
    """At most one system turn, then human and gpt in alternation, ending with gpt."""

    def as_json(self) -> dict[str, object]:
        """The stored form: LLaVA's own, without keys that LLaVA does not define."""
        images = {"image": self.images[0] if len(self.images) == 1 else list(self.images)} if self.images else {}
        turns = [{"from": role, "value": text} for role, text in self.turns]
        return {"id": self.id, **images, "conversations": turns}


def record_id(value: object, ordinal: int) -> str | None:
    """The id the ledger names a record by: its own, else its ordinal; None when its own is unusable."""
    if not isinstance(value, dict):
        return None
    found = value.get("id")
    if found is None:
        return str(ordinal)
    if isinstance(found, bool) or not isinstance(found, str | int) or not is_unicode(str(found)):
        return None
    return str(found)


def parse_record(value: object, ordinal: int) -> LlavaRecord:
    """Validate one record.

    Raises:
        UnusableSample: If `value` breaks a rule; with the first.
    """
    if not isinstance(value, dict):
        raise UnusableSample("not_an_object", f"found a {type(value).__name__}, expected an object")
    found_id = record_id(value, ordinal)
    if found_id is None:
        raise UnusableSample("bad_id", f"id is {shorten(value['id'])}, expected a string or an integer")
    turns = parse_turns(value.get("conversations"))
    check_complete(turns)
    images = _parse_images(value.get("image"))
    check_only_first_question(turns, len(images))
    return LlavaRecord(id=found_id, has_own_id=value.get("id") is not None, images=images, turns=turns)


def _parse_images(found: object) -> tuple[str, ...]:
    # Exporters write null, "" or [] for a sample without an image.
    if found is None or found in ("", []):
        return ()
    paths = found if isinstance(found, list) else [found]
    return tuple(_parse_path(path) for path in paths)


def _parse_path(found: object) -> str:
    if not isinstance(found, str) or not found.strip():
        raise UnusableSample("bad_image_field", f"image is {shorten(found)}, expected a path or a list of paths")
    if not is_unicode(found) or "\0" in found:
        raise UnusableSample("bad_image_field", f"image is {shorten(found)}, which no file can be named")
    path = PurePosixPath(found)
    if path.is_absolute() or ".." in path.parts:
        raise UnusableSample("path_leaves_folder", f"{shorten(found)} is absolute or has '..'")
    return str(path)
