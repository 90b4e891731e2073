"""Reads a checkpoint's JSON configs without a library, so that a wrong one is refused before any is loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storage.digests import parse_object
from storage.errors import CorruptData, UserError
from storage.regular_files import read_regular

CONFIG = "config.json"
_MOST = {"layers": 2**12, "layer": 2**12, "depth": 2**12, "experts": 2**12, "labels": 2**17}
"""Ends of keys that count what a model is made of -> the largest number that is believed."""


def read_config(file: Path) -> dict[str, Any]:
    """The fields of a Hugging Face config.

    Raises:
        CorruptData: If it is no JSON object, too large or too deep, or its `model_type` is no text.
        UserError: If it asks for more layers, experts or labels than any model has.
        FileNotFoundError: If there is none.
    """
    todo = "expected a Hugging Face config: fetch or save them again"
    fields = parse_object(read_regular(file), str(file), todo)
    if not isinstance(fields.get("model_type", ""), str):
        raise CorruptData(f"{file} has model_type {fields['model_type']!r:.100}, which is no text; {todo}")
    _refuse_counts(fields, file)
    return fields


def num_decoder_layers(config: Mapping[str, Any]) -> int | None:
    """Layers of the decoder, of a multimodal model too; None where only the library knows how many there are."""
    decoder = config.get("text_config", config)
    found = decoder.get("num_hidden_layers") if isinstance(decoder, Mapping) else None
    return found if isinstance(found, int) and found > 0 else None


def _refuse_counts(value: Any, file: Path) -> None:
    """The library makes a list, a table or modules of so many, before weights are compared with them."""
    if isinstance(value, list):
        for part in value:
            _refuse_counts(part, file)
    elif isinstance(value, dict):
        for key, part in value.items():
            most = next((most for word, most in _MOST.items() if key.endswith(word)), None)
            if most is not None and isinstance(part, int | float) and abs(part) > most:
                raise UserError(f"{file} has {key} {part:.0f}, at most {most:,} are made; fetch or save it again")
            _refuse_counts(part, file)
