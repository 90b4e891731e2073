import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from stages.samples.sources import data_file, tables
from stages.samples.sources.data_file import open_source
from stages.unusable_sample import UnusableSample
from storage.errors import UserError
from tests.stages.samples.saved_rows import save_rows
from tests.stages.samples.sources.test_json_files import records_of

ROWS = [{"id": f"é{number}", "images": [{"bytes": bytes([number]) * 50, "path": None}]} for number in range(45)]
TABLE = pyarrow.Table.from_pylist(ROWS)


def test_a_file_is_read_by_its_content_and_not_by_its_name(tmp_path: Path) -> None:
    for name, text in {"a.jsonl": "[{}, {}]", "b.json": "{}\n{}", "c.txt": "[{},{}]", "d": "{}\n\n{}"}.items():
        for packed in (False, True):
            data = text.encode()
            (tmp_path / name).write_bytes(gzip.compress(data) if packed else data)
            assert records_of(tmp_path / name) == [{}, {}]


def test_rows_of_parquet_files_and_saved_data_sets_are_read_in_order_and_in_any_order(tmp_path: Path) -> None:
    parquet.write_table(TABLE, tmp_path / "rows", row_group_size=20)
    assert records_of(tmp_path / "rows") == ROWS
    assert records_of(save_rows(TABLE, tmp_path / "saved", num_files=3)) == ROWS
    assert records_of(tmp_path / "saved/data-00001-of-00003.arrow") == ROWS[15:30]
    for number in range(2):
        (tmp_path / "parts").mkdir(exist_ok=True)
        part = tmp_path / f"parts/train-{number:05d}-of-00002-a1b2.parquet"
        parquet.write_table(TABLE.slice(25 * number, 25), part)
    assert records_of(tmp_path / "parts") == ROWS


def test_few_rows_are_in_memory_at_a_time(tmp_path: Path) -> None:
    rows = pyarrow.table({"image": [number.to_bytes(4) * 25_000 for number in range(400)]})
    parquet.write_table(rows, tmp_path / "rows", row_group_size=20, use_dictionary=False)
    save_rows(rows, tmp_path / "saved")
    del rows
    for name in ("rows", "saved"):
        before, arrow = pyarrow.total_allocated_bytes(), 0
        tracemalloc.start()
        with open_source(tmp_path / name) as source:
            for _ in source.scan():
                arrow = max(arrow, pyarrow.total_allocated_bytes() - before)
        python = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert 100_000 < arrow + python < 10_000_000


def test_a_text_that_is_not_utf8_costs_its_row_alone(tmp_path: Path) -> None:
    texts = pyarrow.array([b"a", b"\xff", b"b"]).cast(pyarrow.string(), safe=False)
    parquet.write_table(pyarrow.table({"id": texts}), tmp_path / "rows")
    first, bad, last = records_of(tmp_path / "rows")
    assert (first, last) == ({"id": "a"}, {"id": "b"})
    assert isinstance(bad, UnusableSample)
    assert bad.reason == "not_utf8"


@pytest.mark.parametrize("name", ["rows", "saved/data-00000-of-00001.arrow", "lines.gz"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.97])
def test_a_file_cut_short_anywhere_is_refused_by_name(name: str, share: float, tmp_path: Path) -> None:
    parquet.write_table(TABLE, tmp_path / "rows")
    save_rows(TABLE, tmp_path / "saved")
    (tmp_path / "lines.gz").write_bytes(gzip.compress(json.dumps({"a": list(range(5000))}).encode()))
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=f"{name}.*(cut short|damaged)"):
        records_of(tmp_path / name)


def test_a_stream_cut_between_two_batches_is_not_taken_for_whole(tmp_path: Path) -> None:
    table = pyarrow.table({"animal": CODED})
    file = save_rows(table, tmp_path / "saved", rows_at_once=4) / "data-00000-of-00001.arrow"
    data, ends = file.read_bytes(), []
    with file.open("rb") as messages:
        while pyarrow.ipc.read_message(messages).type != "record batch":
            ends.append(messages.tell())
    for end in (*ends, len(data) - 8, len(data) - 4):
        file.write_bytes(data[:end])
        with pytest.raises(UserError, match="cut short"):
            records_of(file)
    assert len(ends) == 2


CODED = pyarrow.array(["cat", "dog", "cat", None]).dictionary_encode()


def test_dictionary_encoded_columns_are_read_as_their_values(tmp_path: Path) -> None:
    nested = pyarrow.StructArray.from_arrays([CODED], ["kind"])
    table = pyarrow.table({"id": [1, 2, 3, 4], "animal": CODED, "more": nested})
    parquet.write_table(table, tmp_path / "rows")
    assert records_of(tmp_path / "rows") == table.to_pylist()
    assert records_of(save_rows(table, tmp_path / "saved", num_files=2)) == table.to_pylist()


@pytest.mark.parametrize("deltas", [False, True])
def test_dictionaries_that_change_within_a_stream_are_followed(deltas: bool, tmp_path: Path) -> None:
    longer = pyarrow.DictionaryArray.from_arrays(pyarrow.array([2, 0], pyarrow.int32()), ["cat", "dog", "cow"])
    batches = [pyarrow.record_batch({"animal": each}) for each in (CODED, longer)]
    options = pyarrow.ipc.IpcWriteOptions(emit_dictionary_deltas=deltas)
    with pyarrow.ipc.new_stream(str(tmp_path / "rows"), batches[0].schema, options=options) as stream:
        for batch in batches:
            stream.write_batch(batch)
    assert records_of(tmp_path / "rows") == [row for batch in batches for row in batch.to_pylist()]


def test_a_dictionary_that_lacks_a_value_is_a_damaged_file(tmp_path: Path) -> None:
    unknown = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0, 9], pyarrow.int32()), ["cat"], safe=False)
    save_rows(pyarrow.table({"animal": unknown}), tmp_path / "saved")
    with pytest.raises(UserError, match=r"00001.arrow cannot be read .* damaged"):
        records_of(tmp_path / "saved")


@pytest.mark.parametrize(
    ("error", "to_do"),
    [
        (MemoryError(), "need more memory than there is; give the command more"),
        (pyarrow.ArrowMemoryError("malloc of size 99 failed"), "99 failed; .* more memory than there is"),
        (pyarrow.ArrowNotImplementedError("codec"), "install a newer pyarrow"),
    ],
)
def test_a_whole_file_that_cannot_be_read_is_not_called_damaged(
    error: Exception, to_do: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(tables, "_row", fail)
    parquet.write_table(TABLE, tmp_path / "rows")
    with pytest.raises(UserError, match=to_do) as caught:
        records_of(tmp_path / "rows")
    assert "damaged" not in str(caught.value)


def test_the_rows_of_one_split_are_one_data_set_and_others_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without Parquet files or a saved data set"):
        records_of(tmp_path)
    (tmp_path / "data").mkdir()
    parts = [tmp_path / f"data/train-{number:05d}-of-00003.parquet" for number in range(3)]
    for part in parts:
        parquet.write_table(TABLE, part)
    with pytest.raises(UserError, match=r"there are some in .*/data"):
        records_of(tmp_path)
    parts[1].unlink()
    with pytest.raises(UserError, match=r"lacks 1 of the 3 parts .* number 1;"):
        records_of(tmp_path / "data")
    parquet.write_table(TABLE, tmp_path / "data/test-00000-of-00001.parquet")
    with pytest.raises(UserError, match="several splits: test, train;"):
        records_of(tmp_path / "data")
    for part in (parts[0], parts[2]):
        part.unlink()
    parquet.write_table(TABLE, tmp_path / "data/more.parquet")
    with pytest.raises(UserError, match="several splits: test and others"):
        records_of(tmp_path / "data")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match=r"several splits: \['train', 'test'\]"):
        records_of(tmp_path)


SAVED_STATES = {
    "another folder's file": ({"_data_files": [{"filename": "../a.arrow"}]}, "not in this folder"),
    "no files": ({"_data_files": None}, "names no data files"),
    "chosen rows": ({"_data_files": [], "_indices_files": [{"filename": "i.arrow"}]}, "flatten_indices"),
    "rows chosen by an older library": (
        {"_data_files": [], "_indices_data_files": [{"filename": "i.arrow"}]},
        "flatten_indices",
    ),
    "a lost file": ({"_data_files": [{"filename": "lost.arrow"}]}, "lost.arrow, which belongs to the data"),
}


@pytest.mark.parametrize("case", SAVED_STATES)
def test_a_saved_data_set_that_is_not_all_here_is_refused(case: str, tmp_path: Path) -> None:
    state, message = SAVED_STATES[case]
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=message):
        records_of(tmp_path)


OTHERS = {
    b"PK\x03\x04rest": "a zip archive; unpack it",
    b"\x28\xb5\x2f\xfdrest": "Zstandard",
    b"version https://git-lfs.github.com/spec/v1\n": "Git LFS",
    b"<!DOCTYPE html>": "a web page",
    b"ARROW1\0\0": "save it as Parquet",
    b"id,image\n": "begins with b'id,image.*expected a JSON list",
}


@pytest.mark.parametrize("data", OTHERS)
def test_other_files_are_called_what_they_are(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_bytes(data)
    with pytest.raises(UserError, match=OTHERS[data]):
        records_of(tmp_path / "data.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.json"):
        records_of(tmp_path / "nowhere.json")


def test_what_a_gzip_file_may_become_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_file, "MIN_UNPACK_BYTES", 10_000)
    (tmp_path / "few.gz").write_bytes(gzip.compress(b" " * 9_999))
    assert records_of(tmp_path / "few.gz") == []
    usual = [{"text": f"{number} " * 9} for number in range(2000)]
    (tmp_path / "usual.gz").write_bytes(gzip.compress(json.dumps(usual).encode()))
    assert records_of(tmp_path / "usual.gz") == usual
    for many in (b" " * 1_000_000, b"{}\n" * 400_000, b"[" + b"1," * 500_000 + b"1]"):
        (tmp_path / "many.gz").write_bytes(gzip.compress(many))
        with pytest.raises(UserError, match=r"many.gz has [\d,]+ bytes and unpacks to more than [\d,]+, .* unpack it"):
            records_of(tmp_path / "many.gz")


def test_without_pyarrow_json_is_read_and_parquet_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.json").write_text("[{}]")
    assert records_of(tmp_path / "a.json") == [{}]
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"compodistill\[datasets\]"):
        records_of(tmp_path / "a.parquet")
