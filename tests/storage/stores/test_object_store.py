"""Samples and targets on S3 (moto's server), read by spawned workers, and refused when damaged."""

import os
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from storage.errors import CorruptData
from storage.integrity.verify import verify
from storage.stores import open_store
from storage.streaming.stream import StreamConfig
from storage.targets.cleaning import clean_partials
from storage.targets.store import TargetStore
from storage.targets.summary import summarize
from tests.storage.builders import extract, files_of, pack, target_stream


@pytest.fixture
def remote(s3_bucket, tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("CDP_CACHE_DIR", str(tmp_path / "cache"))
    return f"{s3_bucket}/{tmp_path.name}"


def upload(folder: Path, url: str) -> None:
    store = open_store(url)
    for path, data in files_of(folder).items():
        store.write(path, data)


def test_a_store_on_s3_has_the_bytes_of_a_local_one_and_streams_alike(remote, tmp_path):
    index = pack(tmp_path / "samples", (4, 3))
    upload(tmp_path / "samples", f"{remote}/samples")
    extract(index, open_store(tmp_path / "targets"))
    far = open_store(f"{remote}/targets")
    for _ in range(2):
        records = extract(index, far)
    assert clean_partials(far) == 0
    assert {path: far.read(path) for path in far.list()} == files_of(tmp_path / "targets")
    assert TargetStore.open(f"{remote}/targets").commits == dict(enumerate(records))
    assert verify(f"{remote}/targets", f"{remote}/samples").findings == ()
    summary = summarize(f"{remote}/targets")
    assert (summary.num_committed, summary.num_samples) == (2, 7)

    config = StreamConfig(seed=0, batch_size=2)
    options = {"rank": 0, "world_size": 1, "epoch": 0}
    near = target_stream(tmp_path / "samples", tmp_path / "targets", config, **options)
    expected = [[sample.key for sample in batch] for batch in near]
    stream = target_stream(f"{remote}/samples", f"{remote}/targets", config, **options)
    loader = DataLoader(stream, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert [[sample.key for sample in batch] for batch in loader] == expected


def test_another_extractors_commit_on_s3_counts(remote, tmp_path):
    index = pack(tmp_path / "samples", (3,))
    store = open_store(f"{remote}/targets")
    (first,) = extract(index, store)
    before = store.list()
    store.remove_tree("commits")
    store.write("commits/000000.json", first.to_bytes())
    (second,) = extract(index, store, skip=("s0-1",))
    assert second == first
    assert store.list() == before


def test_an_object_that_arrives_damaged_is_refused(remote, tmp_path):
    index = pack(tmp_path / "samples", (3,))
    store = open_store(f"{remote}/targets")
    (record,) = extract(index, store)
    name = "map_codes/c/0/0"
    data = store.read(f"{record.path}/{name}")
    store.write(f"{record.path}/{name}", bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(CorruptData, match=f"{name} arrived"):
        TargetStore.open(store).shard(0)
    assert [finding.file for finding in verify(f"{remote}/targets").findings] == [name]
    store.remove_tree(record.path)
    with pytest.raises(CorruptData, match="its folder"):
        TargetStore.open(store).shard(0)


def test_the_credentials_of_these_tests_open_nothing_else(remote):
    assert os.environ["AWS_ENDPOINT_URL"].startswith("http://127.0.0.1:")
    assert os.environ["AWS_ACCESS_KEY_ID"] == "testing"
