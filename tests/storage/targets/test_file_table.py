"""The packed table of a committed folder's files: what a dict says, in a tenth of its memory."""

import pickle

import pytest
from pydantic import ValidationError

from benchmarks.driver_scale import records
from benchmarks.memory import PeakMemory
from storage.stores import FileInfo
from storage.targets.commits import CommitRecord
from storage.targets.file_table import FileTable

FILES = {
    "b/c/0/0": FileInfo(2**40, "ab" * 32),
    "a/zarr.json": FileInfo(0, "0" * 64),
    "b": FileInfo(7, f"{7:064x}"),
}


def test_a_table_says_what_the_dict_says() -> None:
    table = FileTable(FILES)
    assert table == FILES
    assert list(table) == sorted(FILES)
    assert pickle.loads(pickle.dumps(table)) == table
    assert "b/c" not in table
    assert table.get("zarr.json") is None
    with pytest.raises(KeyError):
        table["c"]


@pytest.mark.parametrize(
    "files",
    [
        {"../a": (1, "0" * 64)},
        {"/a": (1, "0" * 64)},
        {"a": (-1, "0" * 64)},
        {"a": (2**63, "0" * 64)},
        {"a": (1, "0" * 63)},
        {"a": (1, "G" * 64)},
        {"a": (1,)},
        ["a"],
    ],
    ids=str,
)
def test_what_is_no_table_of_files_is_refused(files: object) -> None:
    (record,) = records(1, 1, 1)
    with pytest.raises(ValidationError):
        CommitRecord.model_validate({**record.model_dump(), "files": files})


def test_a_file_more_in_open_records_takes_tens_of_bytes() -> None:
    grown = {}
    for num_files in (4, 44):
        fields = [record.model_dump() for record in records(1000, 1000, num_files)]
        memory = PeakMemory()
        kept = [CommitRecord.model_validate(each) for each in fields]
        grown[num_files] = memory.grown_bytes / len(kept)
    assert (grown[44] - grown[4]) / 40 < 80
