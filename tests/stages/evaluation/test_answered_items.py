"""Lines of answered items of somebody else: every value is checked, and a fault is named with file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.evaluation.answered_items import item_line, read_items
from stages.evaluation.metrics import ScoredItem
from stages.evaluation.suites.suite import Item, Likelihood, Question
from storage.errors import UserError

ANSWERS = ("A", (Likelihood(-1.5, 2, -0.5), Likelihood(-3.0, 4, 0.0)))


def line(number: int = 0, **other: Any) -> str:
    item = Item(f"a/{number}", ("a", "all"), (Question("?", ()),) * 2, {"label": "\ud800"}, unit="picture")
    return json.dumps(json.loads(item_line(item, ANSWERS, {"accuracy": True}, [[], []])) | other) + "\n"


def test_an_item_is_read_as_it_was_written_and_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text(line() + line(2)[:-1])
    (tmp_path / "items-1.jsonl").write_text(line(1))
    found = read_items(tmp_path)
    assert list(found) == ["a/1", "a/0"]
    assert found["a/0"].answers == ANSWERS
    assert found["a/0"].scored == ScoredItem(("a", "all"), "picture", {"accuracy": 1.0})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"id": ["a"]}, r"expected id of type str, found \['a'\]"),
        ({"unit": None}, "expected unit of type str, found None"),
        ({"kinds": []}, r"kinds \[\]; expected one text or more"),
        ({"kinds": ["a", 1]}, r"kinds \['a', 1\]; expected one text or more"),
        ({"kinds": "a"}, "expected kinds of type list, found 'a'"),
        ({"counts": {"accuracy": "1"}}, "count 'accuracy' is '1'; expected 0 to 1,000,000"),
        ({"counts": {"accuracy": True}}, "count 'accuracy' is True"),
        ({"counts": {"accuracy": None}}, "count 'accuracy' is None"),
        ({"counts": {"accuracy": -1}}, "count 'accuracy' is -1"),
        ({"counts": {"accuracy": 10**400}}, "count 'accuracy' is 1000"),
        ({"counts": {"accuracy": float("nan")}}, "NaN is no finite number"),
        ({"counts": [1]}, r"expected counts of type dict, found \[1\]"),
        ({"answers": None}, "expected answers of type list, found None"),
        ({"answers": ["A"]}, "1 answers to 2 questions"),
        ({"questions": [1]}, "1; expected an object with prompt, sha256"),
        ({"questions": [{"prompt": "?"}]}, "expected sha256 of type list"),
        ({"questions": [{"prompt": "?", "sha256": [1]}]}, r"sha256 \[1\]; expected a list of texts"),
        ({"questions": [{"prompt": "?", "sha256": [], "candidates": "A"}]}, "candidates 'A'; expected a list of texts"),
        ({"answers": [1]}, "answer 1; expected a text, or a list of"),
        ({"answers": [[[-1.0, 2]]]}, r"answer \[\[-1.0, 2\]\]; expected"),
        ({"answers": [[[-1.0, 0, 0.0]]]}, "answer .*; expected"),
        ({"answers": [[[-1.0, 1.5, 0.0]]]}, "answer .*; expected"),
        ({"answers": [[["-1", 1, 0.0]]]}, "answer .*; expected"),
        ({"answers": [[[-(10**400), 1, 0.0]]]}, "answer .*; expected"),
    ],
)
def test_a_value_of_another_type_is_named_with_file_and_line(
    other: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "items.jsonl").write_text(line() + line(1, **other) + line(2))
    with pytest.raises(UserError, match=rf"items\.jsonl, line 2.*{message}.*remove this line"):
        read_items(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"1", b"{}", b"\xff", b"[" * 10**5, b""])
def test_a_line_that_is_no_item_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_bytes(line().encode() + content + b"\n")
    with pytest.raises(UserError, match=r"items\.jsonl, line 2"):
        read_items(tmp_path)
