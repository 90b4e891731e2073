import gc
import os
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from stages.evaluation.suites.pictures import PictureSpool, SuitePicture
from stages.evaluation.suites.suite_files import SuiteFiles
from storage.errors import StoreUnavailable
from tests.small_disk import small_disk
from tests.stages.evaluation.suites.scorer import write_parquet

__all__ = ["small_disk"]


def test_pictures_of_a_table_are_read_in_any_order_and_from_threads(tmp_path: Path) -> None:
    contents = [bytes([number]) * (1000 + number) for number in range(200)]
    rows = [{"image": {"bytes": data, "path": None}, "raw": data, "text": "x"} for data in contents]
    write_parquet(tmp_path / "test.parquet", rows)
    records = list(SuiteFiles(tmp_path, None, "").rows(tmp_path / "test.parquet"))
    assert [sorted(record) for record in records[:1]] == [["image", "raw", "text"]]
    sources = [record["image"].source for record in records]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda source: source.read(), reversed(sources))) == contents[::-1]


def test_a_record_keeps_no_bytes_and_equal_pictures_are_one(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"image": {"bytes": b"same", "path": name}} for name in ("a.png", "b.png")]
    write_parquet(tmp_path / "test.parquet", rows)
    first, second = SuiteFiles(tmp_path, None, "").rows(tmp_path / "test.parquet")
    assert isinstance(first["image"], SuitePicture)
    assert first["image"] == second["image"]
    assert str(second["image"].source) == f"{tmp_path / 'test.parquet'}: record 0, image"


def test_memory_holds_the_pictures_of_one_row_group(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": os.urandom(2**20), "path": None}} for _ in range(40)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "test.parquet", row_group_size=4)
    rows.clear()
    tracemalloc.start()
    try:
        records = list(SuiteFiles(tmp_path, None, "").rows(tmp_path / "test.parquet"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(records) == 40
    assert peak < 10 * 2**20


def test_the_temporary_file_is_closed_with_its_last_picture() -> None:
    gc.collect()
    before = num_open_files()
    picture = PictureSpool().add(b"data", "a")
    assert num_open_files() == before + 1
    assert picture.read() == b"data"
    del picture
    gc.collect()
    assert num_open_files() == before


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_full_temporary_folder_is_named(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    spool = PictureSpool()
    picture = spool.add(bytes(2**20), "a")
    with pytest.raises(StoreUnavailable, match=r"disk.*No space left on device"):
        spool.add(b"1" * 2**21, "b")
    assert picture.read() == bytes(2**20)
