"""The turns of a record, whatever its layout, with a placeholder for each image in the order of the images."""

from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Final

from stages.conversations.turns import (
    PLACEHOLDER,
    Turn,
    check_order,
    first_question,
    is_unicode,
    role_of,
    shorten,
)
from stages.samples.layouts.fields import CONVERSATION_KEYS, MAX_NAMES, READ_KEYS, UnreadKeys, is_empty, shown_keys
from stages.samples.layouts.images import SOURCE_KEYS, ImageRef, parse_image
from stages.unusable_sample import UnusableSample

_TURN_KEYS: Final = ("from", "role", "value", "content")
_PAIR_KEYS: Final = ("user", "assistant")
_IMAGE_KEYS: Final = ("image", "image_url", "url", "path", "bytes")
_PART_KEYS: Final = ("type", "text", "index", *_IMAGE_KEYS)
_TEXT_PARTS: Final = ("text", "input_text", "output_text")
_IMAGE_PARTS: Final = ("image", "image_url", "input_image")


def layout_of(record: Mapping[str, object]) -> str:
    """The key that holds the turns.

    Raises:
        UnusableSample: If there is none, or more than one.
    """
    there = [key for key in CONVERSATION_KEYS if key in record]
    if not there:
        found, known = shown_keys(*list(record)[:MAX_NAMES]), ", ".join(CONVERSATION_KEYS)
        raise UnusableSample("unknown_layout", f"it has the keys {found}; turns are read from one of {known}")
    filled = [key for key in there if not is_empty(record[key])]
    if len(filled) > 1:
        raise UnusableSample("unread_field", f"{filled[1]} beside {filled[0]}: both hold turns")
    return (filled or there)[0]


class RecordReader:
    """Reads one record; `root` is the image folder that absolute paths may start with.

    Raises:
        UnusableSample: If the record cannot be used.
    """

    def __init__(self, record: Mapping[str, object], root: Path | None) -> None:
        self._record, self._root = record, root
        self._layout = layout_of(record)
        self._unread = UnreadKeys()
        self._unread.leave(record, READ_KEYS, learned=True)
        # Of `image` or `images`: placeholders take them in their order.
        self._listed = list(self._images_of_record())
        self._next = 0
        self.images: list[ImageRef] = []
        """In the order of the placeholders, once `turns` was called; more than these if some were not named."""
        self.dropped_answer = False
        """Whether an answer stood before the first question, which no trainer learns from."""

    @property
    def unread(self) -> frozenset[str]:
        """The keys that were not read and are not needed."""
        return frozenset(self._unread.names)

    def turns(self) -> tuple[Turn, ...]:
        """A system turn if there is one, then questions and answers in alternation."""
        turns = self._turns_of_pairs() if self._layout == "texts" else self._turns_of_roles()
        turns = self._with_system(turns)
        start = first_question(turns)
        if turns[start:] and turns[start].role == "gpt":
            del turns[start]
            self.dropped_answer = True
        checked = tuple(turns)
        check_order(checked)
        return self._with_all_images(checked)

    def _images_of_record(self) -> tuple[ImageRef, ...]:
        one, several = (self._images_of(self._record.get(key)) for key in ("image", "images"))
        if one and several and one != several:
            raise UnusableSample("unread_field", "images beside image: they differ")
        return one or several

    def _images_of(self, found: object) -> tuple[ImageRef, ...]:
        """One image, a list, or nothing."""
        if found is False or is_empty(found):
            return ()
        return tuple(self._image(each, "image") for each in (found if isinstance(found, list | tuple) else (found,)))

    def _image(self, found: object, where: str) -> ImageRef:
        if isinstance(found, Mapping):
            self._unread.leave(found, SOURCE_KEYS, where, learned=True)
        return parse_image(found, self._root)

    def _entries(self) -> list[Mapping[object, object]]:
        found = self._record[self._layout]
        if isinstance(found, Mapping) and all(isinstance(column, list) for column in found.values()):
            # Some tables hold a list of objects as an object of lists.
            found = [dict(zip(found, row, strict=True)) for row in zip_longest(*found.values())]
        if not isinstance(found, list | tuple) or not found:
            raise UnusableSample("empty_conversation", f"{self._layout} is {shorten(found)}, expected turns")
        for index, each in enumerate(found):
            if not isinstance(each, Mapping):
                raise UnusableSample("bad_turn", f"turn {index} is {shorten(each)}, expected an object")
        return list(found)

    def _turns_of_roles(self) -> list[Turn]:
        """`conversations` with from and value, `messages` with role and content."""
        turns: list[Turn] = []
        for index, entry in enumerate(self._entries()):
            role = role_of(_only(entry, "from", "role"), index)
            # An answer before the first question is left out, whatever its weight.
            is_left_out = role == "gpt" and all(turn.role == "system" for turn in turns)
            self._unread.leave(entry, _TURN_KEYS, f"turn {index}", learned=None if is_left_out else role == "gpt")
            turns.append(Turn(role, self._text(_only(entry, "value", "content"), index, is_question=role == "human")))
        return turns

    def _turns_of_pairs(self) -> list[Turn]:
        """`texts` with user and assistant: several questions about the images of a row."""
        turns = []
        for index, entry in enumerate(self._entries()):
            self._unread.leave(entry, _PAIR_KEYS, f"turn {index}", learned=True)
            turns.append(Turn("human", self._text(entry.get("user"), index, is_question=True)))
            turns.append(Turn("gpt", self._text(entry.get("assistant"), index, is_question=False)))
        return turns

    def _with_system(self, turns: list[Turn]) -> list[Turn]:
        system = self._record.get("system")
        if is_empty(system):
            return turns
        if not isinstance(system, str) or not is_unicode(system):
            raise UnusableSample("bad_turn", f"system is {shorten(system)}, expected a string")
        if turns[0].role != "system":
            return [Turn("system", system), *turns]
        if turns[0].text != system:
            raise UnusableSample("bad_turn", "the field system and the system turn differ")
        return turns

    def _with_all_images(self, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        left = self._listed[self._next :]
        if left == self.images and not self._next:  # once with the parts, once in a list
            return turns
        named = any(role == "human" and PLACEHOLDER in text for role, text in turns)
        self.images += left
        # LLaVA's own layout names each image in the text; where others name none, all stand before the first question.
        if not left or named or (self._layout == "conversations" and not is_empty(self._record.get("image"))):
            return turns
        start = first_question(turns)
        asked = Turn("human", f"{PLACEHOLDER}\n" * len(left) + turns[start].text)
        return (*turns[:start], asked, *turns[start + 1 :])

    def _text(self, content: object, index: int, *, is_question: bool) -> str:
        if isinstance(content, list | tuple):
            text = "".join(self._part(part, index) for part in content)
        elif isinstance(content, str):
            text = content
            if is_question:
                self._take(text.count(PLACEHOLDER))
        else:
            raise UnusableSample("bad_turn", f"turn {index} has value {shorten(content)}, expected a string")
        if not is_unicode(text):
            raise UnusableSample("not_utf8", f"turn {index} holds half of a surrogate pair")
        return text

    def _part(self, part: object, index: int) -> str:
        if isinstance(part, str):
            return part
        if not isinstance(part, Mapping):
            raise UnusableSample("bad_turn", f"turn {index} has the part {shorten(part)}, expected an object")
        self._unread.leave(part, _PART_KEYS, f"part of turn {index}", learned=True)
        filled = [key for key in ("text", *_IMAGE_KEYS) if not is_empty(part.get(key))]
        if len(filled) > 1:
            raise UnusableSample("unread_field", f"a part of turn {index} has {filled[1]} beside {filled[0]}")
        kind = part.get("type") or next(iter(filled), None)
        if kind in _TEXT_PARTS:
            if not isinstance(text := part.get("text"), str):
                raise UnusableSample(
                    "bad_turn", f"turn {index} has a text part with {shorten(text)}, expected a string"
                )
            return text
        if kind not in (*_IMAGE_PARTS, *_IMAGE_KEYS):
            raise UnusableSample("unread_field", f"a part of turn {index} of type {shorten(kind)} is not read")
        if filled == ["text"]:
            raise UnusableSample("unread_field", f"an image part of turn {index} has text beside it")
        self._place(part, index)
        return f"{PLACEHOLDER}\n"

    def _place(self, part: Mapping[object, object], turn: int) -> None:
        """The image of a turn's part: its own, the one of the list that its index names, or the next of the list."""
        own = [part[key] for key in _IMAGE_KEYS if not is_empty(part.get(key))]
        index = part.get("index")
        if own:
            self.images.append(self._image(own[0], f"image of turn {turn}"))
        elif index is not None and index != self._next:
            raise UnusableSample(
                "bad_image_field", f"an image part has index {shorten(index)}, expected {self._next}, the next"
            )
        elif self._next == len(self._listed):
            raise UnusableSample("placeholder_without_image", f"a part names no image, and {self._next} are listed")
        else:
            self._take(1)

    def _take(self, count: int) -> None:
        taken = self._listed[self._next : self._next + count]
        self._next += len(taken)
        self.images += taken


def _only(entry: Mapping[object, object], one: str, other: str) -> object:
    """The value of the one key of two that is there."""
    found = [entry[key] for key in (one, other) if entry.get(key) is not None]
    if len(found) > 1 and found[0] != found[1]:
        raise UnusableSample("unread_field", f"{other} of a turn beside {one}: they differ")
    return found[0] if found else None
