"""The two things every stored record is made of: canonical JSON and sha256."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from storage.errors import CorruptData

_CHUNK_BYTES = 1 << 20
MAX_DEPTH = 64
"""Nesting of lists and objects in a stored record."""


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces: equal values give equal bytes, on any machine.

    Raises:
        ValueError: For NaN and infinities, which JSON cannot hold.
    """
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode()


def parse_json(data: bytes, where: str) -> Any:
    """The value in `data`, which nothing makes huge: numbers are finite and short, nesting has a limit.

    Raises:
        CorruptData: If it is not JSON, or not such JSON; `where` says in the message what it is.
    """
    try:
        return json.loads(data, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise CorruptData(f"{where} nests lists and objects too deep to be a record; restore it") from None
    except ValueError as error:
        raise CorruptData(f"{where} is not JSON ({error}); restore it or run `cdp verify`") from error


def check_canonical(value: Any, data: bytes, where: str) -> None:
    """Make sure that `data` is byte for byte what `canonical_json` makes of `value`, which was parsed from it.

    Raises:
        CorruptData: If it is not, or is nested deeper than `MAX_DEPTH`.
    """
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for item in level for inner in _inside(item)]
        if not level:
            break
    else:
        raise CorruptData(f"{where} nests more than {MAX_DEPTH} levels deep, which no record does; restore it")
    try:
        same = canonical_json(value) == data
    except ValueError:  # half a surrogate pair
        same = False
    if not same:
        raise CorruptData(f"{where} is not as it was written (canonical JSON); restore it or run `cdp verify`")


def _inside(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no finite number")
    return value


def digest_of(value: Any) -> str:
    """Sha256 (64 hex digits) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def file_sha256(path: Path) -> str:
    """Sha256 (64 hex digits) of a file, read 1 MiB at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
