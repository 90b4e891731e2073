"""What packing makes of files and layouts of every kind, and what it counts of their records."""

import base64
import gzip
import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from stages.samples.layouts.fields import MAX_NAMES
from stages.samples.llava_record import LlavaRecord
from stages.samples.pack import PackConfig, pack_samples
from stages.samples.record_counts import RecordCounts
from stages.samples.record_groups import RecordGroups
from storage.errors import UserError
from tests.stages.samples.llava_data import LlavaFolder, bomb_png, image_bytes, record, turns
from tests.stages.samples.saved_rows import save_rows
from tests.stages.samples.test_pack import LENIENT, data_bytes, read_ledger, read_shards

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def test_repeated_records_and_ids_are_packed_and_counted_with_and_without_ids(
    llava: LlavaFolder, tmp_path: Path
) -> None:
    for name, sample_id in {"with": "x", "without": None, "empty": ""}.items():
        records = [record(sample_id, "a.jpg"), record(sample_id, "a.jpg", "Where?"), record(sample_id, "a.jpg")]
        records.append(record(sample_id, "b.png"))
        report = pack_samples(llava.write_json(records), llava.images, tmp_path / name)
        assert report.num_samples == 4
        assert report.records.num_repeated_records == 1
        assert report.records.num_repeated_ids == (3 if sample_id else 0)
        (samples,) = read_shards(tmp_path / name)
        assert [sample.record["id"] for sample in samples] == ["x"] * 4 if sample_id else ["0", "1", "2", "3"]


def test_a_number_that_stands_for_an_id_does_not_repeat_one(llava: LlavaFolder, tmp_path: Path) -> None:
    records = [record("1"), record(None, question="And this?")]
    assert pack_samples(llava.write_json(records), llava.images, tmp_path / "out").records == RecordCounts()


def test_what_is_left_unread_dropped_or_read_as_text_is_counted(llava: LlavaFolder, tmp_path: Path) -> None:
    records = [
        {**record("x", "a.jpg"), "width": 8, "source": "s"},
        {**record("y"), "source": "t"},
        record("z", question="What is <image>?"),
        {"conversations": [*turns("q", "Hello")[1:], *turns("q", "a")]},
    ]
    report = pack_samples(llava.write_json(records), llava.images, tmp_path / "out")
    assert report.records == RecordCounts(
        num_unread={"source": 2, "width": 1}, num_answers_dropped=1, num_placeholders_as_text=1
    )


def test_names_of_unread_keys_are_bounded(llava: LlavaFolder, tmp_path: Path) -> None:
    records = [{**record("x"), f"key {number}": 1} for number in range(250)]
    num_unread = pack_samples(llava.write_json(records), llava.images, tmp_path / "out").records.num_unread
    assert len(num_unread) == MAX_NAMES + 1
    assert num_unread["(others)"] == 150


def test_a_record_with_an_unread_video_is_in_the_ledger_with_the_key(llava: LlavaFolder, tmp_path: Path) -> None:
    video = {"id": "v", "video": "clip.mp4", "conversations": turns("<video>\nWhat happens?", "A ball falls.")}
    report = pack_samples(llava.write_json([video, record("i", "a.jpg")]), llava.images, tmp_path / "out", LENIENT)
    assert (report.num_samples, report.num_skipped) == (1, {"unread_field": 1})
    (line,) = read_ledger(tmp_path / "out/skipped.jsonl")
    assert (line["id"], line["detail"]) == ("v", "video is not read, and changes what is learned")


def held(name: str, llava: LlavaFolder) -> dict[str, Any]:
    return {"bytes": (llava.images / name).read_bytes(), "path": None}


def write_rows(llava: LlavaFolder) -> Path:
    """Rows that hold their images, one of them in two rows that do not follow each other."""
    rows = [
        {"images": [held(name, llava) for name in names], "texts": [{"user": f"q{n}", "assistant": "a"}] * 2}
        for n, names in enumerate([["a.jpg"], ["b.png", "a.jpg"], [], ["deep/c.webp"], ["a.jpg"]])
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), llava.root / "rows.parquet", row_group_size=2)
    return llava.root / "rows.parquet"


def test_rows_that_hold_their_images_are_packed_without_a_folder_and_equal_images_lie_together(
    llava: LlavaFolder, tmp_path: Path
) -> None:
    report = pack_samples(write_rows(llava), None, tmp_path / "out")
    (samples,) = read_shards(tmp_path / "out")
    assert [int(sample.key) for sample in samples] == [0, 4, 1, 2, 3]
    a, b, c = ((llava.images / name).read_bytes() for name in ("a.jpg", "b.png", "deep/c.webp"))
    assert [sample.images for sample in samples] == [(a,), (a,), (b, a), (), (c,)]
    assert samples[2].record == {
        "id": "1",
        "image": [f"sha256:{sha256(data).hexdigest()}" for data in (b, a)],
        "conversations": turns("<image>\n<image>\nq1", "a", "q1", "a"),
    }
    assert (report.num_images, report.num_text_only) == (3, 1)


def write_rows_with_images_far_apart(llava: LlavaFolder, num_rows: int) -> Path:
    """One row group in which each image comes twice, half of the rows apart."""
    pictures = [{"bytes": image_bytes(n, size=4 + n // 256), "path": None} for n in range(num_rows // 2)]
    rows = [
        {"images": [image], "texts": [{"user": f"q{turn}", "assistant": "a"}]}
        for turn in range(2)
        for image in pictures
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), llava.root / "far.parquet")
    return llava.root / "far.parquet"


def test_rows_of_a_table_are_decoded_at_most_twice_however_far_apart_an_image_comes_again(
    llava: LlavaFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    iter_batches = parquet.ParquetFile.iter_batches

    def counted(table: parquet.ParquetFile, *args: Any, **more: Any) -> Iterator[pyarrow.RecordBatch]:
        for batch in iter_batches(table, *args, **more):
            decoded.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", counted)
    for num_rows in (64, 256):
        decoded.clear()
        source = write_rows_with_images_far_apart(llava, num_rows)
        assert pack_samples(source, None, tmp_path / f"out {num_rows}").num_images == num_rows // 2
        # The first look takes 20 rows, the first pass all, the second those up to the last image that is new.
        assert sum(decoded) == 32 + num_rows + num_rows // 2
    (samples,) = read_shards(tmp_path / "out 256")
    assert [int(sample.key) for sample in samples[:4]] == [0, 128, 1, 129]
    assert [sample.record["conversations"][0]["value"] for sample in samples[:2]] == ["<image>\nq0", "<image>\nq1"]


def test_disk_holds_the_text_of_further_records_about_an_image_and_no_image_while_packing(
    llava: LlavaFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[bytes] = []
    add = RecordGroups.add

    def recorded(self: RecordGroups, ordinal: int, record: LlavaRecord) -> None:
        add(self, ordinal, record)
        self._file.seek(0)
        written.append(self._file.read())

    monkeypatch.setattr(RecordGroups, "add", recorded)
    large = image_bytes(1, "BMP", 64)
    rows = [{"image": large, "messages": [{**CHAT[0], "content": f"q{n}"}, CHAT[1]]} for n in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), llava.root / "rows")
    pack_samples(llava.root / "rows", None, tmp_path / "out")
    assert written[0] == b""
    assert b"q0" not in written[2]
    assert b"q1" in written[2]
    assert b"q2" in written[2]
    assert len(written[2]) < 500 < len(large)


def test_the_same_records_give_the_same_shards_whatever_file_they_come_in(llava: LlavaFolder, tmp_path: Path) -> None:
    records = [record("x", "a.jpg"), record("y", ["b.png"]), record("z", "a.jpg")]
    lines = b"\n".join(json.dumps(value).encode() for value in records)
    table = pyarrow.Table.from_pylist([records[0], records[2]])
    parquet.write_table(table, llava.root / "few.parquet")
    save_rows(table, llava.root / "saved")
    llava.write_json([records[0], records[2]], "few.json")
    (llava.root / "lines.json").write_bytes(lines)
    (llava.root / "lines.gz").write_bytes(gzip.compress(lines))
    (llava.root / "list.gz").write_bytes(gzip.compress(json.dumps(records).encode()))
    llava.write_json(records, "list.jsonl")
    for names in (("lines.json", "lines.gz", "list.gz", "list.jsonl"), ("few.json", "few.parquet", "saved")):
        for name in names:
            pack_samples(llava.root / name, llava.images, tmp_path / f"out of {name}")
        first, *others = (data_bytes(tmp_path / f"out of {name}") for name in names)
        assert all(other == first for other in others)


def test_images_that_a_record_holds_obey_the_same_limits(llava: LlavaFolder, tmp_path: Path) -> None:
    large, broken = image_bytes(1, "BMP", 200), image_bytes(1, size=64)[:-40]
    records = [
        {"image": f"data:;base64,{base64.b64encode(data).decode()}", "messages": [*CHAT]}
        for data in (large, bomb_png(), broken, image_bytes(2))
    ]
    config = PackConfig(max_skipped_fraction=1.0, max_shard_bytes=20_000)
    report = pack_samples(llava.write_json([*records, record("x", "a.jpg")]), None, tmp_path / "out", config)
    assert report.num_samples == 1
    ledger = read_ledger(tmp_path / "out/skipped.jsonl")
    assert [line["reason"] for line in ledger] == [
        "image_too_large",
        "image_too_large",
        "broken_image",
        "missing_image",
    ]
    assert "a.jpg is a path, and no image folder was given" in ledger[3]["detail"]


def test_absolute_paths_may_lead_into_the_image_folder_and_nowhere_else(llava: LlavaFolder, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(llava.images)
    inside = [str(folder / "a.jpg") for folder in (llava.images, tmp_path / "link")]
    source = llava.write_json([record("x", path) for path in (*inside, str(tmp_path / "a.jpg"))])
    report = pack_samples(source, tmp_path / "link", tmp_path / "out", LENIENT)
    assert report.num_skipped == {"path_leaves_folder": 1}
    (samples,) = read_shards(tmp_path / "out")
    assert {sample.record["image"] for sample in samples} == {"a.jpg"}


UNKNOWN_LAYOUTS: dict[str, tuple[Any, str]] = {
    "questions and answers": (
        [{"image": "a.jpg", "question": "q", "answer": "a"}],
        "Keys found: image, question, answer",
    ),
    "no keys": ([{}], "Keys found: none"),
    "numbers": ([1, 2], "none of the first 2 records .* is a JSON object, the first is a int"),
    "records below a key": ({"data": [record("x")]}, "Keys found: data"),
}


@pytest.mark.parametrize("case", UNKNOWN_LAYOUTS)
def test_an_unknown_layout_is_said_at_once_with_its_keys_and_those_that_are_read(
    case: str, llava: LlavaFolder, tmp_path: Path
) -> None:
    data, message = UNKNOWN_LAYOUTS[case]
    with pytest.raises(UserError, match=message) as refused:
        pack_samples(llava.write_json(data), llava.images, tmp_path / "out")
    assert "conversations, messages, texts" in str(refused.value) or "of objects" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_an_object_on_many_lines_is_not_taken_for_records(llava: LlavaFolder, tmp_path: Path) -> None:
    (llava.root / "data.json").write_text(json.dumps({"data": [record("x")]}, indent=1))
    with pytest.raises(UserError, match=r"none of the first \d+ records .* JSON object, the first is bad_json_line"):
        pack_samples(llava.root / "data.json", llava.images, tmp_path / "out")


def test_an_unknown_layout_is_found_without_reading_the_file(llava: LlavaFolder, tmp_path: Path) -> None:
    lines = b'{"question": "q"}\n' * 20 + b"not read\n" * 100_000
    (llava.root / "lines").write_bytes(lines)
    (llava.root / "packed").write_bytes(gzip.compress(lines)[:-20])
    for name in ("lines", "packed"):
        with pytest.raises(UserError, match="Keys found: question"):
            pack_samples(llava.root / name, llava.images, tmp_path / "out")
