"""Samples and targets on S3 (moto's server), read by spawned workers, and refused when damaged."""

import os
from pathlib import Path
from urllib.parse import quote
from urllib.request import ProxyHandler, Request, build_opener

import pytest
from torch.utils.data import DataLoader

from storage.errors import CorruptData, UserError
from storage.integrity.verify import verify
from storage.stores import open_store
from storage.streaming.stream import StreamConfig
from storage.targets.cleaning import clean_partials
from storage.targets.store import TargetStore
from storage.targets.summary import summarize
from tests.s3_server import BUCKET
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


def put_object(key: str) -> None:
    """As another client does, to which any text is a name."""
    url = f"{os.environ['AWS_ENDPOINT_URL']}/{BUCKET}/{quote(key, safe='')}"
    with build_opener(ProxyHandler({})).open(Request(url, b"escaped-object", method="PUT")):
        pass


@pytest.mark.parametrize(
    "name",
    [
        "../escaped-object",
        "a/../../escaped-object",
        "/etc/escaped-object",
        "a//escaped-object",
        "a\tescaped-object",
        "\x1b[31m",
        "a\\escaped-object",
        ".",
    ],
)
def test_an_object_whose_name_is_no_path_is_an_error_that_names_it(remote, tmp_path, name):
    index = pack(tmp_path / "samples", (3,))
    store = open_store(f"{remote}/targets")
    (record,) = extract(index, store)
    assert verify(f"{remote}/targets").ok
    put_object(f"{store.url.removeprefix(f's3://{BUCKET}/')}/{record.path}/{name}")
    try:
        found = [finding.found for finding in verify(f"{remote}/targets").findings]
    except UserError as error:
        found = [str(error)]
    assert any(store.url in text for text in found)
    with pytest.raises(UserError, match=store.url):
        TargetStore.open(store).shard(0)
    assert not list(tmp_path.parent.rglob("*escaped-object*"))


@pytest.mark.parametrize("url", ["s3://bucket/a/../b", "s3://bucket/a//b", "gs://bucket/./a", "s3://bucket/a\nb"])
def test_an_address_that_is_no_path_is_a_users_error(url):
    with pytest.raises(UserError, match="is no address"):
        open_store(url)


def test_the_credentials_of_these_tests_open_nothing_else(remote):
    assert os.environ["AWS_ENDPOINT_URL"].startswith("http://127.0.0.1:")
    assert os.environ["AWS_ACCESS_KEY_ID"] == "testing"
