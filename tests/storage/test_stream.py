"""One global order, for any number of ranks and workers, and each sample once."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from storage.errors import CorruptData, FingerprintMismatch, UserError
from storage.order import rank_batch
from storage.samples import SampleIndex
from storage.stores import open_store
from storage.stream import StreamConfig, epoch_order, num_steps, shard_sizes, target_stream
from storage.targets import TargetStore
from tests.storage.builders import extract, pack

SHARDS = (7, 1, 5, 4)
SKIP = ("s0-2", "s3-3")
SIZES = {0: 6, 1: 1, 2: 5, 3: 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    extract(pack(root / "samples", SHARDS), open_store(root / "targets"), skip=SKIP)
    return root


def stream(root: Path, config: StreamConfig, **options):
    options = {"rank": 0, "world_size": 1, "epoch": 0, **options}
    return target_stream(open_store(root / "samples"), root / "targets", config, **options)


def keys_of(batches) -> list[list[str]]:
    return [[sample.key for sample in batch] for batch in batches]


sizes = st.dictionaries(st.integers(0, 30), st.integers(0, 9), max_size=12)


@settings(max_examples=50, deadline=None)
@given(sizes, st.integers(0, 99), st.integers(0, 5), st.integers(0, 9))
def test_an_epoch_is_a_permutation_of_all_rows(sizes, seed, epoch, shuffle_shards):
    order = epoch_order(sizes, seed, epoch, shuffle_shards)
    rows = [(shard, row) for shard, size in sorted(sizes.items()) for row in range(size)]
    assert sorted(map(tuple, order.tolist())) == rows
    assert np.array_equal(order, epoch_order(dict(reversed(sizes.items())), seed, epoch, shuffle_shards))
    if shuffle_shards == 0:
        assert [tuple(item) for item in order.tolist()] == rows


@settings(max_examples=50, deadline=None)
@given(sizes, st.integers(0, 9), st.integers(1, 4))
def test_only_so_many_shards_are_mixed(sizes, seed, shuffle_shards):
    shards = epoch_order(sizes, seed, 0, shuffle_shards)[:, 0].tolist()
    for shard in set(shards):
        first, last = shards.index(shard), len(shards) - 1 - shards[::-1].index(shard)
        assert len(set(shards[first : last + 1])) <= shuffle_shards


def test_the_order_is_fixed_for_ever_by_seed_and_epoch():
    assert epoch_order({0: 3, 1: 2}, seed=1, epoch=0, shuffle_shards=8).tolist() == [
        [0, 0],
        [0, 2],
        [1, 0],
        [1, 1],
        [0, 1],
    ]
    orders = {str(epoch_order({0: 50}, seed, epoch, 8).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@settings(max_examples=50, deadline=None)
@given(sizes, st.integers(1, 5), st.integers(1, 6))
def test_ranks_share_each_global_batch_and_have_equally_many(sizes, batch_size, world_size):
    order = epoch_order(sizes, 0, 0, 3)
    steps = num_steps(sizes, batch_size, world_size)
    seen = []
    for step in range(steps):
        parts = [rank_batch(order, step, batch_size, rank, world_size) for rank in range(world_size)]
        lengths = [len(part) for part in parts]
        assert max(lengths) <= batch_size
        assert max(lengths) - min(lengths) <= 1
        if step < steps - 1:
            assert min(lengths) == batch_size
        seen += np.concatenate(parts).tolist()
    assert seen == order.tolist()


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    world_size=st.integers(1, 4),
    batch_size=st.integers(1, 5),
    shuffle_shards=st.integers(0, 4),
    epoch=st.integers(0, 2),
    start_batch=st.integers(0, 6),
    workers=st.integers(0, 3),
)
def test_any_ranks_workers_and_resume_position_give_the_one_global_order(
    data, world_size, batch_size, shuffle_shards, epoch, start_batch, workers
):
    config = StreamConfig(seed=3, shuffle_shards=shuffle_shards, batch_size=batch_size)
    order = epoch_order(SIZES, 3, epoch, shuffle_shards)
    expected = [names(data)[shard][row] for shard, row in order.tolist()]
    per_rank = []
    for rank in range(world_size):
        options = {"rank": rank, "world_size": world_size, "epoch": epoch, "start_batch": start_batch}
        if workers == 0:
            batches = keys_of(stream(data, config, **options))
        else:
            batches = interleaved(
                [keys_of(as_worker(stream(data, config, **options), n, workers)) for n in range(workers)]
            )
        assert len(batches) == max(0, num_steps(SIZES, batch_size, world_size) - start_batch)
        per_rank.append(batches)
    found = [key for step in zip(*per_rank, strict=True) for batch in step for key in batch]
    assert found == expected[start_batch * batch_size * world_size :]


@cache
def names(root: Path) -> dict[int, list[str]]:
    shards = SampleIndex.load(open_store(root / "samples")).shards
    return {
        number: [members.key for members in entry.members if members.key not in SKIP]
        for number, entry in enumerate(shards)
    }


def as_worker(pipeline, number: int, workers: int) -> Iterator:
    """What the DataLoader's worker of this number would yield."""
    info = type("Info", (), {"id": number, "num_workers": workers})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("storage.stream.get_worker_info", lambda: info)
        yield from pipeline


def interleaved(parts: list[list]) -> list:
    return [part[turn] for turn in range(max(map(len, parts))) for part in parts if turn < len(part)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_data_loader_gives_the_same_batches_for_any_number_of_workers(data, workers):
    config = StreamConfig(seed=5, batch_size=2)
    alone = list(stream(data, config, start_batch=1))
    loaded = list(DataLoader(stream(data, config, start_batch=1), batch_size=None, num_workers=workers))
    assert keys_of(loaded) == keys_of(alone)
    for left, right in zip(alone, loaded, strict=True):
        for ours, theirs in zip(left, right, strict=True):
            assert torch.equal(ours.targets.token_ids, theirs.targets.token_ids)
            assert ours.images == theirs.images


def test_streamed_samples_hold_both_sides(data):
    targets = TargetStore.open(data / "targets")
    for batch in stream(data, StreamConfig(seed=0, batch_size=4), layers=[3]):
        for sample in batch:
            shard = targets.shard(int(sample.key[1]))
            expected, maps = shard.read(shard.row_of(sample.key), layers=[3])
            assert sample.record["id"] == f"id-{sample.key}"
            assert sample.targets.key == sample.key == expected.key
            assert torch.equal(sample.targets.logits_RB, expected.logits_RB)
            assert (sample.maps is None) == (maps is None) == (expected.map_row is None)
            if sample.maps is not None:
                assert torch.equal(sample.maps.maps.codes_LC, maps.maps.codes_LC)
            assert all(sample.key.encode() in image for image in sample.images)
    for batch in stream(data, StreamConfig(seed=0, batch_size=4), with_maps=False):
        assert all(sample.maps is None for sample in batch)


def test_resuming_reads_nothing_of_what_came_before(data, tmp_path):
    config = StreamConfig(seed=0, shuffle_shards=1, batch_size=3)
    first_shard = int(epoch_order(SIZES, 0, 0, 1)[0, 0])
    rest = keys_of(stream(data, config, start_batch=4))
    sizes = shard_sizes(TargetStore.open(data / "targets"))
    assert sizes == SIZES
    targets = TargetStore.open(data / "targets")
    opened = []

    class Watched(TargetStore):
        def shard(self, index):
            opened.append(index)
            return super().shard(index)

    watched = Watched(targets.store, targets.manifest, targets.commits)
    found = target_stream(open_store(data / "samples"), watched, config, rank=0, world_size=1, epoch=0, start_batch=4)
    assert keys_of(found) == rest
    assert first_shard not in opened
    assert len(opened) == len(set(opened))


def test_targets_of_other_samples_are_refused(data, tmp_path):
    pack(tmp_path / "samples", (3,))
    other, config = open_store(tmp_path / "samples"), StreamConfig(seed=0, batch_size=1)
    with pytest.raises(FingerprintMismatch, match="differs in: samples"):
        target_stream(other, data / "targets", config, rank=0, world_size=1, epoch=0)


def test_an_unfinished_extraction_is_refused_unless_allowed(tmp_path):
    extract(pack(tmp_path / "samples", (3, 2)), open_store(tmp_path / "targets"))
    (tmp_path / "targets/commits/000001.json").unlink()
    with pytest.raises(UserError, match=r"1 of 2 shards committed .*missing: \[1\]"):
        stream(tmp_path, StreamConfig(seed=0, batch_size=1))
    allowed = stream(tmp_path, StreamConfig(seed=0, shuffle_shards=0, batch_size=9, allow_incomplete=True))
    assert keys_of(allowed) == [["s0-0", "s0-1", "s0-2"]]


def test_targets_whose_keys_are_not_the_tars_are_an_error(tmp_path):
    index = pack(tmp_path / "samples", (3,))
    (entry,) = index.shards
    first, second, third = entry.members
    swapped = (first._replace(key=second.key), second._replace(key=first.key), third)
    other = SampleIndex(shards=(entry.model_copy(update={"members": swapped}),))
    assert other.digest == index.digest
    extract(other, open_store(tmp_path / "targets"))
    with pytest.raises(CorruptData, match=r"are not the 3 of samples-000000\.tar"):
        list(stream(tmp_path, StreamConfig(seed=0, batch_size=1)))


def test_a_rank_outside_the_world_is_refused(data):
    with pytest.raises(ValueError, match="rank is 2 of 2"):
        stream(data, StreamConfig(seed=0, batch_size=1), rank=2, world_size=2)
