"""Sample shards: what is written is read, in groups, deterministically, or refused."""

import tarfile

import pytest

from storage.errors import CorruptData, UserError
from storage.samples.index import SampleIndex
from storage.samples.members import StoredSample, image_suffix
from storage.samples.sample_set import SampleSet
from storage.samples.shard_writer import SampleShardWriter
from storage.stores import open_store
from tests.storage.builders import JPG, PNG, files_of, stored_samples, write_table

WEBP = b"RIFF\x10\x00\x00\x00WEBPVP8 "


def group(*keys: str, images: tuple[bytes, ...] = (PNG + b"pixels",)) -> list[StoredSample]:
    return [StoredSample(key, {"id": key, "conversations": []}, images) for key in keys]


def test_samples_round_trip_in_any_order(tmp_path):
    samples = [*stored_samples([f"k{n}" for n in range(7)]), *group("several", images=(JPG, PNG, WEBP))]
    with SampleShardWriter(tmp_path, 4, 10**6) as writer:
        for sample in samples:
            writer.add_group([sample])
    packed = SampleSet.open(tmp_path)
    index = packed.index
    assert [entry.num_samples for entry in index.shards] == [4, 4]
    assert index.num_samples == 8
    found = {}
    for number in range(len(index.shards)):
        with packed.shard(number) as shard:
            shard.verify()
            assert len(shard) == len(packed.members(number))
            for row in reversed(range(len(shard))):
                found[packed.members(number)[row].key] = shard.read(row)
    assert [found[sample.key] for sample in samples] == samples


def test_the_tar_is_plain_webdataset_with_deterministic_headers(tmp_path):
    for out in ("a", "b"):
        with SampleShardWriter(tmp_path / out, 9, 10**6) as writer:
            writer.add_group(group("one") + group("two", images=(JPG, PNG)) + group("none", images=()))
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    with tarfile.open(tmp_path / "a" / "samples-000000.tar") as tar:
        assert tar.getnames() == ["one.json", "one.png", "two.json", "two.0.jpg", "two.1.png", "none.json"]
        assert {(m.mtime, m.uid, m.gid, m.mode, m.isreg()) for m in tar} == {(0, 0, 0, 0o644, True)}


def test_a_group_is_split_only_when_it_alone_is_too_large(tmp_path):
    with SampleShardWriter(tmp_path, 4, 10**6) as writer:
        writer.add_group(group("a1", "a2", "a3"))
        writer.add_group(group("b1", "b2"))
        writer.add_group(group("c1", "c2", "c3", "c4", "c5"))
    packed = SampleSet.open(tmp_path)
    keys = [[members.key for members in packed.members(number)] for number in range(len(packed.index.shards))]
    assert keys == [["a1", "a2", "a3"], ["b1", "b2"], ["c1", "c2", "c3", "c4"], ["c5"]]


def test_shards_stay_below_their_bytes(tmp_path):
    with SampleShardWriter(tmp_path, 100, 8000) as writer:
        for number in range(10):
            writer.add_group(group(f"k{number}"))
    index = SampleIndex.load(open_store(tmp_path))
    assert len(index.shards) > 1
    assert all(entry.bytes <= 8000 for entry in index.shards)


def test_an_exception_leaves_no_index_and_nothing_half_written(tmp_path):
    def die() -> None:
        with SampleShardWriter(tmp_path, 1, 10**6) as writer:
            writer.add_group(group("a"))
            writer.add_group(group("b"))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        die()
    assert sorted(files_of(tmp_path)) == ["samples-000000.json", "samples-000000.tar"]
    with pytest.raises(UserError, match="is no sample set"):
        SampleIndex.load(open_store(tmp_path))
    with SampleShardWriter(tmp_path, 9, 10**6) as writer:
        writer.add_group(group("a"))
    assert sorted(files_of(tmp_path)) == ["index.json", "samples-000000.json", "samples-000000.tar"]
    with pytest.raises(UserError, match="already holds"), SampleShardWriter(tmp_path, 9, 10**6):
        pass


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (group("a.b"), "no safe member name"),
        (group("../a"), "no safe member name"),
        (group(""), "no safe member name"),
        (group("x", "x"), "comes twice"),
        (group("x", images=(b"%PDF-1.7",)), "of no known format"),
    ],
)
def test_unsafe_samples_are_refused(tmp_path, bad, message):
    with SampleShardWriter(tmp_path, 9, 10**6) as writer:
        with pytest.raises(ValueError, match=message):
            writer.add_group(bad)
        writer.add_group(group("good"))
    assert SampleIndex.load(open_store(tmp_path)).num_samples == 1


def test_every_flipped_byte_of_a_sample_is_seen_when_it_is_read(tmp_path):
    with SampleShardWriter(tmp_path, 9, 10**6) as writer:
        writer.add_group(group("a"))
    packed = SampleSet.open(tmp_path)
    path = tmp_path / "samples-000000.tar"
    clean = path.read_bytes()
    spans = packed.members(0)[0].spans
    last_offset, last_bytes = spans[-1]
    padding = {i for offset, size in spans for i in range(offset + size, -(-(offset + size) // 512) * 512)}
    for position in range(0, last_offset + last_bytes, 7):
        if position in padding:
            continue
        path.write_bytes(clean[:position] + bytes([clean[position] ^ 1]) + clean[position + 1 :])
        with packed.shard(0) as shard:
            with pytest.raises(CorruptData, match="sample a"):
                shard.read(0)
            with pytest.raises(CorruptData, match="sha256"):
                shard.verify()


def test_a_truncated_or_missing_tar_is_an_error(tmp_path):
    with SampleShardWriter(tmp_path, 9, 10**6) as writer:
        writer.add_group(group("a", "b"))
    packed = SampleSet.open(tmp_path)
    path = tmp_path / "samples-000000.tar"
    path.write_bytes(path.read_bytes()[:1024])
    with pytest.raises(CorruptData, match="1024 bytes, the index says"):
        packed.shard(0)
    path.unlink()
    with pytest.raises(CorruptData, match="is missing"):
        packed.shard(0)


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        (b'"format_version":2', b'"format_version":1', UserError),
        (b'"format_version":2', b'"format_version":3', UserError),
        (b"samples-000000.tar", b"../../etc/passwd.t", CorruptData),
        (b'"num_samples":1', b'"num_sampled":1', CorruptData),
        (b'"num_samples":1', b'"num_samples":-1', CorruptData),
        (b'"shards":[', b'"shards":1,"x":[', CorruptData),
        (b'"table_bytes":', b'"table_bytes":9999999999', CorruptData),
        (b'"table_sha256":"', b'"table_sha256":"0', CorruptData),
        (b'"name"', b'"store":1,"name"', CorruptData),
        (b"{", b"[", CorruptData),
    ],
)
def test_an_index_that_is_not_ours_is_refused(tmp_path, old, new, error):
    with SampleShardWriter(tmp_path, 9, 10**6) as writer:
        writer.add_group(group("a"))
    data = (tmp_path / "index.json").read_bytes()
    assert old in data
    (tmp_path / "index.json").write_bytes(data.replace(old, new, 1))
    with pytest.raises(error):
        SampleIndex.load(open_store(tmp_path))


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        (b'"format_version":2', b'"format_version":3', UserError, "format version 3, this version reads 2"),
        (b'"members":[[', b'"members":[],"more":[[', CorruptData, "the fields"),
        (b'["a",', b'["../a",', CorruptData, "a sample '../a'"),
        (b"[[512", b"[[513", CorruptData, "not aligned"),
        (b"[[512", b"[[1024", CorruptData, "overlaps"),
        (b"[1536,", b"[1048576,", CorruptData, "its members end at"),
        (b"[1536,", b'["x",', CorruptData, "no table"),
        (b'["a",', b'["b",[[512,2]],3],["a",', CorruptData, "lists 2 samples, num_samples is 1"),
    ],
)
def test_a_member_table_that_is_not_ours_is_refused_though_the_index_names_it(tmp_path, old, new, error, message):
    with SampleShardWriter(tmp_path, 9, 10**6) as writer:
        writer.add_group(group("a"))
    data = (tmp_path / "samples-000000.json").read_bytes()
    assert old in data
    write_table(tmp_path, data.replace(old, new, 1))
    with pytest.raises(error, match=message):
        _ = SampleSet.open(tmp_path).members(0)


def test_a_member_table_that_is_not_the_one_of_the_index_is_refused(tmp_path):
    with SampleShardWriter(tmp_path, 9, 10**6) as writer:
        writer.add_group(group("a"))
    packed, table = SampleSet.open(tmp_path), tmp_path / "samples-000000.json"
    clean = table.read_bytes()
    for position in range(len(clean)):
        table.write_bytes(clean[:position] + bytes([clean[position] ^ 1]) + clean[position + 1 :])
        with pytest.raises(CorruptData, match="the index says"):
            packed.shard(0)
    for data in (clean[:-1], clean + b" "):
        table.write_bytes(data)
        with pytest.raises(CorruptData, match=r"the index says|at most"):
            packed.shard(0)
    table.unlink()
    with pytest.raises(CorruptData, match="is missing"):
        packed.shard(0)


def test_packing_refuses_what_no_reader_would_open(tmp_path, monkeypatch):
    monkeypatch.setattr("storage.samples.shard_writer.MAX_TABLE_BYTES", 100)
    with pytest.raises(UserError, match="fewer samples into a shard"), SampleShardWriter(tmp_path, 9, 10**6) as writer:
        writer.add_group(group("a", "b"))
    assert files_of(tmp_path) == {}
    monkeypatch.setattr("storage.samples.shard_writer.MAX_TABLE_BYTES", 10**6)
    monkeypatch.setattr("storage.samples.shard_writer.MAX_INDEX_BYTES", 1200)
    with pytest.raises(UserError, match="more than 2 shards"), SampleShardWriter(tmp_path, 1, 10**6) as writer:
        writer.add_group(group("a", "b", "c"))
    assert "index.json" not in files_of(tmp_path)


def test_loading_an_index_reads_no_table_and_a_sample_costs_it_no_memory(tmp_path):
    with SampleShardWriter(tmp_path, 9, 10**6) as writer:
        writer.add_group(group(*"abc"))
    small = (tmp_path / "index.json").stat().st_size
    (tmp_path / "samples-000000.json").unlink()
    assert SampleIndex.load(open_store(tmp_path)).num_samples == 3
    with SampleShardWriter(tmp_path / "more", 99, 10**6) as writer:
        writer.add_group(group(*(f"k{number}" for number in range(99))))
    assert (tmp_path / "more/index.json").stat().st_size < small + 10


def test_the_digest_follows_the_data(tmp_path):
    for name, key in (("a", "k"), ("b", "k"), ("c", "other")):
        with SampleShardWriter(tmp_path / name, 9, 10**6) as writer:
            writer.add_group(group(key))
    a, b, c = (SampleIndex.load(open_store(tmp_path / name)).digest for name in "abc")
    assert a == b != c


def test_image_suffixes_come_from_the_first_bytes():
    bitmap = b"BM" + bytes(12) + b"\x28\0\0\0"
    files = (JPG, PNG, WEBP, b"GIF89a", bitmap, b"II*\0", b"MM\0+", b"BM is a word", b"GIF", b"")
    suffixes = ["jpg", "png", "webp", "gif", "bmp", "tif", "tif", None, None, None]
    assert [image_suffix(data) for data in files] == suffixes
