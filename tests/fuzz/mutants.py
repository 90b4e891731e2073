"""Ways to spoil a file: hostile values in JSON, and bytes that are changed, cut off, put in or moved."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

from tests.storage.integrity.forging import Leaf, value_at, ways

DEEP = 10_000
HOSTILE = {
    "an empty string": '""',
    "zero": "0",
    "minus one": "-1",
    "minus zero": "-0",
    "minus zero as a float": "-0.0",
    "a float for an integer": "1.0",
    "a fraction": "0.5",
    "near the largest float": "1e308",
    "above the largest float": "1e999",
    "near zero": "5e-324",
    "NaN": "NaN",
    "infinity": "-Infinity",
    "2^31": str(2**31),
    "2^53 + 1": str(2**53 + 1),
    "2^63 - 1": str(2**63 - 1),
    "2^63": str(2**63),
    "2^64": str(2**64),
    "2^80": str(2**80),
    "300 digits": "9" * 300,
    "5,000 digits": "9" * 5000,
    "true": "true",
    "null": "null",
    "an empty list": "[]",
    "an empty object": "{}",
    "a list of a list": "[[1]]",
    "a list of many": f"[{','.join(['0'] * 20_000)}]",
    "an object of other keys": '{"a":{"b":[1,{"c":null}]}}',
    "an object of many keys": "{" + ",".join(f'"k{number}":0' for number in range(20_000)) + "}",
    "half a surrogate pair": '"\\ud800"',
    "control characters": '"\\u0000\\u001b[31m\\u202e\\n"',
    "a path above": '"../../../etc/passwd"',
    "an absolute path": '"/etc/passwd"',
    "a long string": f'"{"x" * 10**6}"',
    "a long path": f'"{"x/" * 3000}x"',
    "a number in a string": '"1"',
    "digits of another script": '"\\u0661"',
    "a digest": f'"{"0" * 64}"',
    "deep lists": "[" * DEEP + "]" * DEEP,
    "deep objects": '{"a":' * DEEP + "1" + "}" * DEEP,
    "50 lists deep": "[" * 50 + "]" * 50,
}
"""JSON texts, by what they are; some are no JSON by the standard, and Python reads them."""

WHOLE = [
    b"",
    b"\0",
    b"null",
    b"[]",
    b"{}",
    b"1",
    b'""',
    b"[" * 10**6,
    b"9" * 10**5,
    b"\xff\xfe{}",
    b"{" * 10**5,
    b"NaN",
]
"""Contents in place of a file's own."""

Spoil = Callable[[Any, Leaf], None]


def _delete(document: Any, leaf: Leaf) -> None:
    del value_at(document, leaf[:-1])[leaf[-1]]


def _rename(document: Any, leaf: Leaf) -> None:
    inside = value_at(document, leaf[:-1])
    if isinstance(inside, dict):
        inside[f"{leaf[-1]}_"] = inside.pop(leaf[-1])


def _repeat(document: Any, leaf: Leaf) -> None:
    inside = value_at(document, leaf[:-1])
    if isinstance(inside, list):
        inside.insert(int(leaf[-1]), inside[int(leaf[-1])])


@st.composite
def spoiled_values(draw: st.DrawFn, document: Any) -> Any:
    """The document with one to three values replaced, removed, renamed or repeated; those that Python can hold."""
    document = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 3))):
        if not (all_ways := list(ways(document))):
            break
        leaf = draw(st.sampled_from(all_ways))
        what = draw(st.sampled_from(["replace", "replace", "replace", "near", "swap", "delete", "rename", "repeat"]))
        inside, value = value_at(document, leaf[:-1]), value_at(document, leaf)
        if what == "near" and isinstance(value, int | float):
            inside[leaf[-1]] = value + draw(st.sampled_from([-1, 1, 2, 512, -value * 2]))
        elif what == "near" and isinstance(value, str):
            inside[leaf[-1]] = draw(st.sampled_from([value[:-1], value + "x", value.upper(), f" {value}"]))
        elif what == "swap":
            inside[leaf[-1]] = json.loads(json.dumps(value_at(document, draw(st.sampled_from(all_ways)))))
        elif spoil := {"delete": _delete, "rename": _rename, "repeat": _repeat}.get(what):
            spoil(document, leaf)
        else:
            text = draw(
                st.sampled_from([text for text in HOSTILE.values() if not text.startswith(("[[[", '{"a":{"a"'))])
            )
            inside[leaf[-1]] = json.loads(text) if len(text) != 5000 else 10**300
    return document


@st.composite
def spoiled_json(draw: st.DrawFn, data: bytes, texts: Sequence[str] = tuple(HOSTILE.values())) -> bytes:
    """The text of a JSON document with one to three values replaced by some of `texts`, or a key given twice."""
    document, chosen = json.loads(data), {}
    for number in range(draw(st.integers(1, 3))):
        if not (all_ways := list(ways(document))):
            break
        leaf = draw(st.sampled_from(all_ways))
        inside, value = value_at(document, leaf[:-1]), value_at(document, leaf)
        mark = f"mark{number}"
        text = draw(st.sampled_from(texts))
        if isinstance(leaf[-1], str) and draw(st.integers(0, 4)) == 0:
            text = f"{text},{json.dumps(leaf[-1])}:{json.dumps(value)}"
        chosen[f'"{mark}"'] = text
        inside[leaf[-1]] = mark
    out = json.dumps(document, separators=(",", ":"))
    for mark, text in chosen.items():
        out = out.replace(mark, text)
    return out.encode()


@st.composite
def spoiled_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes after one to four flips, cuts, insertions, removals or copies from one place to another."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        place, length = draw(st.integers(0, len(out))), draw(st.sampled_from([1, 2, 4, 8, 16, 512]))
        what = draw(st.sampled_from(["flip", "flip", "set", "cut", "insert", "remove", "copy", "fill"]))
        if what == "flip" and place < len(out):
            out[place] ^= 1 << draw(st.integers(0, 7))
        elif what == "set" and place < len(out):
            out[place] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 0x20, 0x22, 0x7D]))
        elif what == "cut":
            del out[place:]
        elif what == "insert":
            out[place:place] = draw(st.binary(min_size=1, max_size=16))
        elif what == "remove":
            del out[place : place + length]
        elif what == "copy":
            start = draw(st.integers(0, len(out)))
            out[place : place + length] = out[start : start + length]
        else:
            out[place : place + length] = bytes([draw(st.sampled_from([0, 0xFF]))]) * length
    return bytes(out)


def spoiled(name: str, data: bytes) -> st.SearchStrategy[bytes]:
    """A file of this name and content, spoiled in any of these ways."""
    ways_of = [spoiled_bytes(data), st.sampled_from(WHOLE)]
    return st.one_of(*([spoiled_json(data)] * 4 if name.endswith(".json") else []), *ways_of)
