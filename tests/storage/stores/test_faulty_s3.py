"""Errors, lost answers and broken connections of an S3 server: retried, or a clear error; never half a shard."""

import contextlib
from pathlib import Path

import pytest

from storage.errors import StoreUnavailable
from storage.integrity.verify import verify
from storage.stores import Store, open_store
from storage.targets.commits import CommitRecord
from storage.targets.manifest import create_or_check
from storage.targets.shard_writer import write_shard
from storage.targets.store import TargetStore
from tests.faulty_s3 import Faults
from tests.storage.builders import extract, files_of, manifest, pack, shard_content

KEYS = ["a", "b", "c"]
SLOW = pytest.mark.slow


@pytest.fixture
def faulty(faulty_s3, tmp_path, monkeypatch) -> tuple[Store, Faults]:
    url, faults = faulty_s3
    monkeypatch.setenv("CDP_CACHE_DIR", str(tmp_path / "cache"))
    return open_store(f"{url}/{tmp_path.name}"), faults


def write(store: Store, seed: int = 0) -> CommitRecord:
    made_for = manifest()
    create_or_check(store, made_for)
    samples, maps = shard_content(made_for, KEYS, seed)
    return write_shard(store, 0, made_for, "samples-000000.tar", samples, maps, [])


def expected_bytes(folder: Path) -> dict[str, bytes]:
    write(open_store(folder))
    return files_of(folder)


@pytest.mark.parametrize("kind", ["500", "lost", pytest.param("drop", marks=SLOW), pytest.param("slow", marks=SLOW)])
@pytest.mark.parametrize("path", [pytest.param("manifest.json", marks=SLOW), "map_codes/c/0/0", "commits/000000.json"])
def test_a_commit_survives_faults_of_each_put_and_has_the_bytes_of_an_undisturbed_one(faulty, tmp_path, kind, path):
    store, faults = faulty
    fault = faults.plan(kind, "PUT", path, times=2 if kind == "500" else 1)
    # A put whose connection broke may have been done, so it is not repeated blindly: a rerun decides.
    with contextlib.suppress(StoreUnavailable) if kind in ("drop", "slow") else contextlib.nullcontext():
        write(store)
    record = write(store)
    assert fault.used == fault.times
    assert {name: store.read(name) for name in store.list()} == expected_bytes(tmp_path / "whole")
    assert TargetStore.open(store).commits == {0: record}
    assert verify(store.url).ok


@pytest.mark.parametrize("kind", ["500", "drop", "cut", pytest.param("slow", marks=SLOW)])
def test_reads_survive_faults(faulty, kind):
    store, faults = faulty
    write(store)
    faults.plan(kind, "GET", "commits/000000.json")
    faults.plan(kind, "GET", "map_codes/c/0/0")
    shard = TargetStore.open(store).shard(0)
    assert [shard.read(row)[0].key for row in range(3)] == KEYS
    assert [fault.used for fault in faults.planned] == [1, 1]
    assert verify(store.url).ok


@pytest.mark.parametrize(
    "kind", ["500", "403", *(pytest.param(kind, marks=SLOW) for kind in ("drop", "cut", "slow", "401"))]
)
def test_a_read_that_fails_for_good_is_an_error_that_names_the_store_and_keeps_nothing(faulty, tmp_path, kind):
    store, faults = faulty
    write(store)
    # Each fault is met by every retry of a read.
    fault = faults.plan(kind, "GET", "map_codes/c/0/0", times=100)
    targets = TargetStore.open(store)
    with pytest.raises(StoreUnavailable, match=r"could not read .*map_codes.*run the same command again"):
        targets.shard(0)
    # Verification does not take it for damage.
    with pytest.raises(StoreUnavailable):
        verify(store.url)
    cache = tmp_path / "cache"
    assert [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size] == []
    fault.times = 0
    assert len(targets.shard(0)) == 3
    assert verify(store.url).ok


@pytest.mark.parametrize(
    "path", ["map_codes/c/0/0", pytest.param("token_ids/zarr.json", marks=SLOW), "commits/000000.json"]
)
def test_a_commit_that_fails_for_good_leaves_no_shard_and_a_rerun_completes_it(faulty, tmp_path, path):
    store, faults = faulty
    create_or_check(store, manifest())
    fault = faults.plan("500", "PUT", path, times=100)
    with pytest.raises(StoreUnavailable):
        write(store)
    assert TargetStore.open(store).commits == {}
    fault.times = 0
    write(store)
    assert {name: store.read(name) for name in store.list()} == expected_bytes(tmp_path / "whole")
    assert list((tmp_path / "cache").rglob("*.partial")) == []


def test_a_record_whose_answer_was_lost_each_time_is_ours(faulty):
    store, faults = faulty
    create_or_check(store, manifest())
    faults.plan("lost", "PUT", "commits/", times=100)
    record = write(store)
    assert TargetStore.open(store).commits == {0: record}
    assert store.create("commits/000000.json", b"other") is False


def test_the_record_of_another_extractor_counts_when_our_put_gets_no_answer(faulty, tmp_path):
    store, faults = faulty
    first = write(store, seed=1)
    before = store.list()
    fault = faults.plan("lost", "PUT", "commits/", times=1)
    assert write(store, seed=2) == first
    assert fault.used == 1
    assert store.list() == before


def test_a_stream_of_many_parts_survives_a_cut_in_each(faulty, monkeypatch):
    monkeypatch.setattr("storage.stores.objects.PART_BYTES", 1000)
    store, faults = faulty
    data = bytes(range(256)) * 40
    store.write("file", data)
    faults.plan("cut", "GET", "file", times=3)
    assert store.local("file").read_bytes() == data


def test_samples_and_targets_go_through_a_bad_hour(faulty, tmp_path):
    store, faults = faulty
    index = pack(tmp_path / "samples", (3, 2))
    for number, kind in enumerate(("500", "lost", "500", "lost")):
        faults.plan(kind, "PUT", f"shards/00000{number % 2}", times=1 + number // 2)
    extract(index, store)
    extract(index, open_store(tmp_path / "whole"))
    assert {name: store.read(name) for name in store.list()} == files_of(tmp_path / "whole")
