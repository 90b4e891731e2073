"""Requests of lmms-eval as prompts and settings; needs nothing of that package."""

from collections.abc import Mapping
from typing import Any, Final

from stages.evaluation.harness.prompted_model import DecodingConfig
from stages.evaluation.harness.prompts import Prompt, to_prompt

DEFAULT_STOP: Final = "\n\n"
"""What lmms-eval ends answers with where a task names nothing; its own models leave it out, and so does this one."""

_READ: Final = (
    "do_sample",
    "max_new_tokens",
    "num_beams",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
    "until",
)


def decoding_of(settings: Mapping[str, Any]) -> tuple[DecodingConfig, list[str]]:
    """The `generation_kwargs` of a task as settings, and the names of those that are not read.

    Tokens are drawn if the temperature is above 0, unless `do_sample` is false.
    """
    given = {name: settings[name] for name in _READ if settings.get(name) is not None}
    until = given.pop("until", ())
    stop = (until,) if isinstance(until, str) else tuple(until)
    if not given.pop("do_sample", True):
        given["temperature"] = 0.0
    unread = sorted(settings.keys() - _READ)
    return DecodingConfig(**given, stop=tuple(text for text in stop if text and text != DEFAULT_STOP)), unread


def prompt_of_text(name: str, text: str, visuals: Any) -> Prompt:
    """The prompt of a request of the simple kind: a text, and the pictures before it unless it says `<image>`."""
    parts = [{"type": "image", "url": visual} for visual in visuals or () if visual is not None]
    return to_prompt(name, [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}])
