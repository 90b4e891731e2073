"""What a tokenizer.json may ask of the library: rules that lengthen text are bounded, its panics become errors."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from storage.digests import parse_json
from storage.errors import CorruptData, UserError
from storage.regular_files import MAX_BYTES, read_regular

_FILE = "tokenizer.json"
_MAX_BYTES = 4 * MAX_BYTES
"""Of that file; the largest known one, with 262,000 tokens, has 33 MB."""
_MAX_GROWTH = 1000
"""Characters that all replacements of a tokenizer together may make of one; real ones make at most three."""


def check_tokenizer(folder: Path) -> None:
    """Refuses a tokenizer.json whose replacements make gigabytes of a short text.

    Raises:
        UserError: If they do, or it has more than 256 MiB.
    """
    file = folder / _FILE
    if not file.is_file():
        return
    data = read_regular(file, _MAX_BYTES)
    try:
        rules = parse_json(data, str(file))
    except CorruptData:
        return  # the library says what is wrong with it
    steps = [isinstance(rules, dict) and rules.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
    if (growth := math.prod(max(1, len(text)) for text in _replacements(steps))) > _MAX_GROWTH:
        found = f"{file} replaces one character by up to {growth:.3g}, at most {_MAX_GROWTH} are taken"
        raise UserError(f"{found}; fetch the tokenizer again, or use another")


@contextmanager
def panics_raised() -> Iterator[None]:
    """Turns a panic of the tokenizer library, such as a pattern's that tries too often, into an error.

    Raises:
        ValueError: Instead of the panic, which is no `Exception` and would end a worker.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizer gave up: {error}") from error


def _replacements(value: Any) -> Iterator[str]:
    """Texts at any depth that stand in for others."""
    if isinstance(value, list):
        for part in value:
            yield from _replacements(part)
    elif isinstance(value, dict):
        for key, part in value.items():
            if key in ("content", "prepend", "replacement") and isinstance(part, str):
                yield part
            yield from _replacements(part)
