"""The two things every stored record is made of: canonical JSON and sha256."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from storage.errors import CorruptData, UserError
from storage.regular_files import open_regular

MAX_DEPTH = 64
"""Nesting of lists and objects in a stored record."""


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces: equal values give equal bytes, on any machine.

    Raises:
        ValueError: For NaN and infinities, which JSON cannot hold.
    """
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def parse_json(data: bytes, where: str, todo: str = "restore it or run `cdp verify`") -> Any:
    """The value in `data`, which nothing makes huge: numbers are finite and short, nesting has a limit.

    Raises:
        CorruptData: If it is not JSON, or not such JSON; says where, and what is to do.
    """
    try:
        return json.loads(data, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise CorruptData(f"{where} nests lists and objects too deep to be read; {todo}") from None
    except ValueError as error:
        raise CorruptData(f"{where} is not JSON ({error}); {todo}") from error


def parse_object(data: bytes, where: str, todo: str) -> dict[str, Any]:
    """The fields of a JSON object that can be written again, of at most `MAX_DEPTH` levels.

    Raises:
        CorruptData: If it is none; says where, and what is to do.
    """
    fields = parse_json(data, where, todo)
    if not isinstance(fields, dict):
        raise CorruptData(f"{where} holds no JSON object; {todo}")
    _check_depth(fields, where, todo)
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except ValueError as error:
        raise CorruptData(f"{where} holds text that is no Unicode (half a surrogate pair); {todo}") from error
    return fields


def parse_record(data: bytes, where: str, *format_versions: int, canonical: bool = True) -> dict[str, Any]:
    """The fields of a stored JSON record, once its format version is known to be one of those given.

    Raises:
        CorruptData: If it is no JSON object with a format version, or not `canonical` as it should be.
        UserError: If the version is another one.
    """
    fields = parse_json(data, where)
    if not isinstance(fields, dict) or type(fields.get("format_version")) is not int:
        raise CorruptData(f"{where} has no format_version; restore it or run `cdp verify`")
    found = fields["format_version"]
    if found not in format_versions:
        digests = (_digest_without(fields, "digest"), _digest_without(fields, "digest", "path"))
        if canonical and "digest" in fields and fields["digest"] not in digests:
            raise CorruptData(f"{where} is damaged: its digest is not that of its content; restore it")
        todo = "upgrade compodistill" if found > max(format_versions) else "make it again with this version"
        ours = " and ".join(", ".join(map(str, format_versions)).rsplit(", ", 1))
        raise UserError(f"{where} has format version {found}, this version reads {ours}; {todo}")
    if canonical:
        _check_canonical(fields, data, where)
    return fields


def _digest_without(fields: dict[str, Any], *names: str) -> str:
    try:
        return digest_of({key: value for key, value in fields.items() if key not in names})
    except (ValueError, RecursionError):
        return ""


def _check_canonical(value: Any, data: bytes, where: str) -> None:
    """Make sure that `data` is what `canonical_json` makes of `value`, which was parsed from it, and not too deep."""
    _check_depth(value, where, "restore it")
    try:
        same = canonical_json(value) == data
    except ValueError:  # half a surrogate pair
        same = False
    if not same:
        raise CorruptData(f"{where} is not as it was written (canonical JSON); restore it or run `cdp verify`")


def _check_depth(value: Any, where: str, todo: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for item in level for inner in _inside(item)]
        if not level:
            return
    raise CorruptData(f"{where} nests more than {MAX_DEPTH} levels deep, which no file of ours does; {todo}")


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
    """Sha256 (64 hex digits) of a file, which is not read at once; raises as `open_regular`."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
