"""Which keys of a record are read, which may not be ignored, and which are only counted."""

import re
from collections.abc import Collection, Mapping
from typing import Any, Final

from stages.unusable_sample import UnusableSample
from storage.printable import printable

CONVERSATION_KEYS: Final = ("conversations", "messages", "texts")
"""Each holds the turns, in a layout of its own."""

READ_KEYS: Final = ("id", "image", "images", "system", *CONVERSATION_KEYS)
"""Keys of a record that are read."""

_INPUT_KEYS = """
    image images system conversations messages texts
    audio audios audio_path audio_paths audio_url input_audio sound speech
    video videos video_path video_paths video_url video_urls frames
    image_base64 image_bytes image_data image_file image_files image_path image_paths image_url image_urls
    img imgs jpeg jpg png webp picture pictures pixel_values
    point_cloud point_clouds depth depths
    tools tool_calls tool_call_id functions function_call documents
    system_prompt system_message history prefix suffix objects
    chat_template chat_template_kwargs enable_thinking reasoning reasoning_content thinking
    mm_processor_kwargs min_pixels max_pixels resized_height resized_width
    chosen rejected chosen_response rejected_response completion completions kto_tag
    instruction context
"""
INPUT_KEYS: Final = frozenset(_INPUT_KEYS.split())
"""Keys that change what a model sees or what an answer is, and that nothing here reads, in lower case."""

_INPUT_NAMES: Final = re.compile(
    r"(input_)?(image|img|picture)s?_?\d+|input_(image|img|picture)s?"
    r"|(\w+_)?(audio|video)s?(_(file|name|path|url)s?)?(_?\d+)?|media(_\w+)?|(\w+_)?rejected(_\w+)?"
)
"""Further names of such keys: `image_1`, `video_file`. Under these a number says how good or how long something is."""

_LOSS_KEYS = """
    ignore_loss loss loss_mask loss_multiplier loss_scale loss_weight mask sample_weight train train_detail weight
"""
LOSS_KEYS: Final = frozenset(_LOSS_KEYS.split())
"""Keys that say how much is learned of an answer. An answer of weight 1 and a question of weight 0 are what is done."""

MAX_NAMES: Final = 100
"""Names of unread keys that are counted each by itself: a stranger's file may have a million."""


_SWITCHES: Final = frozenset({"chosen", "enable_thinking", "kto_tag", "reasoning", "rejected", "thinking"})
"""Input keys under which `false` says something. Under the others, such as `tools`, it says that there are none."""

_MAX_SHOWN: Final = 80


def is_empty(value: object) -> bool:
    """Whether a value holds nothing, at any depth: tables have a column for what only some of their rows have."""
    left = [value]
    while left:
        each = left.pop()
        if isinstance(each, Mapping):
            left.extend(each.values())
        elif isinstance(each, list | tuple):
            left.extend(each)
        elif each is not None and each not in ("", b""):
            return False
    return True


def shown_keys(*keys: object) -> str:
    """Names of keys as a message has them: at most 80 characters, with escapes for what would not be seen."""
    text = printable(", ".join(map(str, keys)))
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


class UnreadKeys:
    """Collects the keys of one record that are not read."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def leave(
        self, fields: Mapping[Any, object], read: Collection[str], where: str = "", *, learned: bool | None
    ) -> None:
        """Leaves all keys of `fields` but those that are `read`; `where` names the part of the record.

        Whether it is `learned` is what keys of the loss are compared with; None if it is not used at all.

        Raises:
            UnusableSample: If a key that is left may not be ignored; names it.
        """
        for key, value in fields.items():
            if key in read or is_empty(value):
                continue
            name, shown = str(key).lower(), shown_keys(key)
            if value is False and name in INPUT_KEYS - _SWITCHES:
                continue
            of_loss = learned is not None and name in LOSS_KEYS and value != int(learned != (name == "ignore_loss"))
            if _is_input(name, value) or name in read or of_loss or _holds_bytes(value):
                inside = f" of {where}" if where else ""
                raise UnusableSample("unread_field", f"{shown}{inside} is not read, and changes what is learned")
            if name not in LOSS_KEYS:
                self.names.add(f"{where.split(' ')[0]}.{shown}" if where else shown)


def _is_input(name: str, value: object) -> bool:
    each = value if isinstance(value, list) else [value]
    return name in INPUT_KEYS or (
        _INPUT_NAMES.fullmatch(name) is not None and not all(isinstance(one, int | float) for one in each)
    )


def _holds_bytes(value: object) -> bool:
    """Whether a value of a table holds a picture or a sound: nothing else is bytes there."""
    each = value if isinstance(value, list) else [value]
    return any(isinstance(one.get("bytes") if isinstance(one, Mapping) else one, bytes) for one in each)
