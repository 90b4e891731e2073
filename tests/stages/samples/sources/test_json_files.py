import io
import json
from pathlib import Path

import pytest

from stages.samples.sources import json_files
from stages.samples.sources.data_file import open_source
from stages.samples.sources.json_files import JsonList
from stages.unusable_sample import UnusableSample
from storage.errors import UserError


def records_of(path: Path) -> list[object]:
    """What is read, after a pass that was given up in the middle and a whole one that read the same."""
    with open_source(path) as source:
        next(source.scan(), None)
        first, found = list(source.scan()), list(source.scan())
    assert [str(record) for record in first] == [str(record) for record in found]
    return found


def test_a_list_and_lines_give_the_same_records(tmp_path: Path) -> None:
    values = [{"id": number, "text": 'é猫 ]},[{\\"'} for number in range(3)]
    for name, text in {
        "list": json.dumps(values),
        "lines on many lines": "\n " + json.dumps(values, indent=1, ensure_ascii=False) + " \n",
        "lines": "\n\n".join(map(json.dumps, values)) + "\n  \n",
        "lines without an end": "\n".join(json.dumps(value, ensure_ascii=False) for value in values),
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert records_of(tmp_path / name) == values


@pytest.mark.parametrize("read_at_once", [1, 2, 3, 7])
def test_a_list_is_the_same_wherever_the_pieces_that_are_read_end(
    read_at_once: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(json_files, "_READ_AT_ONCE", read_at_once)
    values = [{"é": "猫🙂\\"}, 12345, [True, None, -1.5e3], "]", {}, 0]
    (tmp_path / "a").write_text(json.dumps(values, ensure_ascii=False, indent=2), encoding="utf-8")
    assert records_of(tmp_path / "a") == values


def test_a_list_of_any_size_is_never_in_memory_as_a_whole() -> None:
    class Measured(io.BytesIO):
        handed_out = 0

        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            self.handed_out += len(data)
            return data

    file = Measured(json.dumps([{"text": "x" * 1000}] * 5000).encode())
    records = JsonList(file, "a").scan()
    next(records)
    assert file.handed_out <= 2**20
    assert sum(1 for _ in records) == 4999


@pytest.mark.parametrize("content", ["[]", " [ ] ", "", " \n "])
def test_a_file_without_records_has_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_text(content)
    assert records_of(tmp_path / "a") == []


def test_a_byte_order_mark_is_not_part_of_the_data(tmp_path: Path) -> None:
    for text in ("[{}]", "{}"):
        (tmp_path / "a").write_text(text, encoding="utf-8-sig")
        assert records_of(tmp_path / "a") == [{}]


BAD_LINES = {
    "half an object": (b'{"id": 1', "bad_json_line"),
    "latin-1": ('{"id": "caf\xe9"}'.encode("latin-1"), "not_utf8"),
    "nested too deep": (b"[" * 200_000, "bad_json_line"),
    "a number of 5000 digits": (b"9" * 5000, "bad_json_line"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_one_unusable_sample_and_the_next_is_read(case: str, tmp_path: Path) -> None:
    line, reason = BAD_LINES[case]
    (tmp_path / "a").write_bytes(b'{"a":1}\n' + line + b"\n2\n")
    first, bad, last = records_of(tmp_path / "a")
    assert (first, last) == ({"a": 1}, 2)
    assert isinstance(bad, UnusableSample)
    assert bad.reason == reason


def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "MAX_RECORD_BYTES", 10)
    (tmp_path / "a").write_bytes(b"{}\n" + b" " * 35 + b"\n[" + b"1," * 50 + b"1]\n2")
    first, long, last = records_of(tmp_path / "a")
    assert (first, last) == ({}, 2)
    assert isinstance(long, UnusableSample)
    assert long.reason == "line_too_long"


BAD_LISTS = {
    "cut short": (b'[{"id": 1},\n {"id"', "line 2, column 7"),
    "cut behind a record": (b'[{"id": 1}\n', "Expecting ',' delimiter|Expecting ','"),
    "a record too much": (b'[{"id": 1}] {}', "Extra data at line 1, column 13"),
    "a comma too much": (b"[1,]", "line 1, column 4"),
    "latin-1": ('["caf\xe9"]'.encode("latin-1"), "byte 0xe9 at offset 5"),
    "nested too deep": (b"[" * 200_000, "is not JSON"),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_a_bad_list_is_refused_whole_with_the_position(case: str, tmp_path: Path) -> None:
    content, message = BAD_LISTS[case]
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        records_of(tmp_path / "a.json")
    assert "a.json" in str(refused.value)


def test_a_record_of_a_list_too_large_for_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "MAX_READ_CHARS", 10)
    monkeypatch.setattr(json_files, "_READ_AT_ONCE", 4)
    (tmp_path / "a").write_text(json.dumps([1, "x" * 100]))
    with pytest.raises(UserError, match="more than 10 characters, at byte 4"):
        records_of(tmp_path / "a")


@pytest.mark.parametrize("read_at_once", [4, 2**16])
def test_a_record_of_a_list_that_is_too_long_is_the_only_one_left_out(
    read_at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_files, "MAX_RECORD_BYTES", 10)
    monkeypatch.setattr(json_files, "_READ_AT_ONCE", read_at_once)
    # Four characters of three bytes each.
    (tmp_path / "a").write_text(json.dumps([1, "\u6f22\u5b57" * 2, 2], ensure_ascii=False))
    first, long, last = records_of(tmp_path / "a")
    assert (first, last) == (1, 2)
    assert isinstance(long, UnusableSample)
    assert (long.reason, long.detail) == ("line_too_long", "over 10 bytes at byte 4")
