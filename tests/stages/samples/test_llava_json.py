import json
from pathlib import Path

import pytest

from stages.samples import llava_json
from stages.samples.llava_json import open_llava_records
from stages.unusable_sample import UnusableSample
from storage.errors import UserError


def test_a_list_and_lines_give_the_same_records(tmp_path: Path) -> None:
    values = [{"id": number} for number in range(3)]
    whole, lines = tmp_path / "data.json", tmp_path / "data.jsonl"
    whole.write_text(json.dumps(values))
    lines.write_text("\n\n".join(map(json.dumps, values)) + "\n  \n")
    for records in map(open_llava_records, (whole, lines)):
        assert [records.load(position) for position in records.positions()] == values


def test_a_byte_order_mark_is_not_part_of_the_data(tmp_path: Path) -> None:
    for name, text in (("data.json", "[1]"), ("data.jsonl", "1")):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8-sig")
        records = open_llava_records(path)
        assert [records.load(position) for position in records.positions()] == [1]


BAD_LINES = {
    "half an object": (b'{"id": 1', "bad_json_line"),
    "latin-1": ('{"id": "caf\xe9"}'.encode("latin-1"), "not_utf8"),
    "nested too deep": (b"[" * 200_000, "bad_json_line"),
    "a number of 5000 digits": (b"9" * 5000, "bad_json_line"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_one_unusable_sample_and_the_next_is_read(case: str, tmp_path: Path) -> None:
    line, reason = BAD_LINES[case]
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"1\n" + line + b"\n2\n")
    records = open_llava_records(path)
    first, bad, last = records.positions()
    assert (records.load(first), records.load(last)) == (1, 2)
    with pytest.raises(UnusableSample) as found:
        records.load(bad)
    assert found.value.reason == reason


def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llava_json, "MAX_LINE_BYTES", 10)
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"1\n" + b" " * 35 + b"\n[" + b"1," * 50 + b"1]\n2")
    records = open_llava_records(path)
    first, long, last = records.positions()
    assert (records.load(first), records.load(last)) == (1, 2)
    with pytest.raises(UnusableSample, match="line_too_long"):
        records.load(long)


BAD_FILES = {
    "cut short": (b'[{"id": 1}, {"id"', "line 1, column"),
    "one record a line": (b'{"id": 1}\n{"id": 2}', "name it .jsonl"),
    "an object": (b'{"id": 1}', "expected a list"),
    "latin-1": ('["caf\xe9"]'.encode("latin-1"), "byte 0xe9 at offset 5"),
    "nested too deep": (b"[" * 200_000, "is not JSON"),
    "empty": (b"", "is not JSON"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_list_is_refused_whole_with_the_position(case: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[case]
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_llava_records(path)


def test_a_list_too_large_for_memory_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llava_json, "MAX_JSON_BYTES", 3)
    path = tmp_path / "data.json"
    path.write_text("[1, 2]")
    with pytest.raises(UserError, match=r"name the file \.jsonl"):
        open_llava_records(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.json"):
        open_llava_records(tmp_path / "nowhere.json")
