"""One global order, for any number of ranks and workers, and each sample once."""

import math
import shutil
import threading
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from storage.errors import CorruptData, FingerprintMismatch, UserError
from storage.samples.sample_set import SampleSet
from storage.samples.table import table_to_bytes
from storage.stores import LocalStore, open_store
from storage.streaming.join import OPENING_THREADS, OpenShards
from storage.streaming.mixture import Mixture, Source, shard_sizes
from storage.streaming.order import deal, epoch_order, num_microbatches, shard_rows
from storage.streaming.stream import StreamConfig, mixture_stream
from storage.targets.store import TargetStore
from tests.storage.builders import extract, pack, target_stream, write_table

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
    return target_stream(root / "samples", root / "targets", config, **options)


def keys_of(batches) -> list[list[str]]:
    return [[sample.key for sample in batch] for batch in batches]


def whole(sizes: dict[int, int]) -> list[np.ndarray]:
    return [shard_rows(shard, size) for shard, size in sorted(sizes.items())]


sizes = st.dictionaries(st.integers(0, 30), st.integers(0, 9), max_size=12)


@settings(max_examples=50, deadline=None)
@given(sizes, st.integers(0, 99), st.integers(0, 5), st.integers(0, 9))
def test_an_epoch_is_a_permutation_of_all_rows(sizes, seed, epoch, shuffle_shards):
    order = epoch_order(whole(sizes), seed, epoch, shuffle_shards)
    rows = [(shard, row) for shard, size in sorted(sizes.items()) for row in range(size)]
    assert sorted(map(tuple, order.tolist())) == rows
    if shuffle_shards == 0:
        assert [tuple(item) for item in order.tolist()] == rows


@settings(max_examples=50, deadline=None)
@given(sizes, st.integers(0, 9), st.integers(1, 4))
def test_only_so_many_shards_are_mixed(sizes, seed, shuffle_shards):
    shards = epoch_order(whole(sizes), seed, 0, shuffle_shards)[:, 0].tolist()
    for shard in set(shards):
        first, last = shards.index(shard), len(shards) - 1 - shards[::-1].index(shard)
        assert len(set(shards[first : last + 1])) <= shuffle_shards


def test_the_order_is_fixed_for_ever_by_seed_and_epoch():
    assert epoch_order(whole({0: 3, 1: 2}), seed=1, epoch=0, shuffle_shards=8).tolist() == [
        [0, 0],
        [0, 2],
        [1, 0],
        [1, 1],
        [0, 1],
    ]
    orders = {str(epoch_order(whole({0: 50}), seed, epoch, 8).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@pytest.mark.parametrize("shuffle_shards", [1, 4, 16, 64])
def test_neighbours_of_a_shard_end_up_a_third_of_the_mixed_rows_apart(shuffle_shards):
    # Of a full permutation of all rows the mean distance of two of them is a third of all; here of those mixed.
    num_shards, size = 64, 100
    order = epoch_order(whole(dict.fromkeys(range(num_shards), size)), 0, 0, shuffle_shards)
    place = np.empty((num_shards, size))
    place[order[:, 0], order[:, 1]] = np.arange(len(order))
    distance = np.abs(np.diff(place, axis=1)).mean()
    assert distance == pytest.approx(shuffle_shards * size / 3, rel=0.05)
    batches = order[:, 0].reshape(-1, 50)
    shards_of_a_batch = np.mean([len(set(batch)) for batch in batches.tolist()])
    expected = shuffle_shards * (1 - (1 - 1 / shuffle_shards) ** 50)
    assert shards_of_a_batch == pytest.approx(expected, rel=0.1)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.none() | st.integers(1, 5), st.integers(1, 6), st.booleans())
def test_ranks_share_each_step_and_have_equally_many_microbatches(size, microbatch_size, world_size, by_length):
    lengths = np.arange(size) * 7 % 11 if by_length else None
    dealt = deal(size, microbatch_size, world_size, lengths)
    assert len(dealt) == num_microbatches(size, microbatch_size, world_size)
    pieces = [piece for microbatch in dealt for piece in microbatch]
    assert all(len(microbatch) == world_size for microbatch in dealt)
    assert microbatch_size is None or max(map(len, pieces)) <= microbatch_size
    assert all(max(map(len, each)) - min(map(len, each)) <= 1 for each in dealt)
    together = np.concatenate(pieces)
    assert sorted(together) == list(range(size))
    if lengths is None:
        assert together.tolist() == list(range(size))
    else:
        assert np.all(np.diff(lengths[together]) <= 0)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    world_size=st.integers(1, 4),
    batch_size=st.integers(1, 7),
    microbatch_size=st.none() | st.integers(1, 3),
    bucket=st.booleans(),
    shuffle_shards=st.integers(0, 4),
    epoch=st.integers(0, 2),
    start_step=st.integers(0, 3),
    workers=st.sampled_from([0, 1, 2, 6]),
)
def test_any_ranks_workers_and_resume_position_give_the_steps_of_the_one_global_order(
    data, world_size, batch_size, microbatch_size, bucket, shuffle_shards, epoch, start_step, workers
):
    config = StreamConfig(
        seed=3,
        shuffle_shards=shuffle_shards,
        batch_size=batch_size,
        microbatch_size=microbatch_size,
        bucket_by_length=bucket,
    )
    mixture = Mixture([Source(SampleSet.open(data / "samples"), TargetStore.open(data / "targets"))], config)
    epochs = range(epoch, epoch + 2)
    per_rank = []
    for rank in range(world_size):
        options = {"rank": rank, "world_size": world_size, "epochs": epochs, "start_step": start_step}
        if workers == 0:
            batches = keys_of(mixture_stream(mixture, **options))
        else:
            parts = [keys_of(as_worker(mixture_stream(mixture, **options), n, workers)) for n in range(workers)]
            batches = interleaved(parts)
        per_rank.append(batches)
    assert len({len(batches) for batches in per_rank}) == 1
    microbatches = iter(zip(*per_rank, strict=True))
    for number in epochs:
        order = epoch_order(whole(SIZES), 3, number, shuffle_shards)
        expected = [names(data)[shard][row] for shard, row in order.tolist()]
        assert len(order) == mixture.num_samples
        for step in range(start_step if number == epoch else 0, math.ceil(len(order) / batch_size)):
            wanted = expected[step * batch_size : (step + 1) * batch_size]
            count = num_microbatches(len(wanted), microbatch_size, world_size)
            found = [key for _ in range(count) for batch in next(microbatches) for key in batch]
            assert sorted(found) == sorted(wanted)
            assert bucket or found == wanted
    assert next(microbatches, None) is None


def test_with_bucketing_microbatches_of_the_same_number_have_like_lengths(data):
    config = StreamConfig(seed=0, batch_size=15, microbatch_size=2, bucket_by_length=True)
    per_rank = [list(stream(data, config, rank=rank, world_size=2)) for rank in (0, 1)]
    lengths = [
        [len(sample.targets.token_ids) for batch in both for sample in batch] for both in zip(*per_rank, strict=True)
    ]
    assert sum(map(len, lengths)) == 15
    assert all(min(longer) >= max(shorter) for longer, shorter in pairwise(lengths))


@cache
def names(root: Path) -> dict[int, list[str]]:
    samples = SampleSet.open(root / "samples")
    return {
        number: [members.key for members in samples.members(number) if members.key not in SKIP]
        for number in range(len(samples.index.shards))
    }


def as_worker(pipeline, number: int, workers: int) -> Iterator:
    """What the DataLoader's worker of this number would yield."""
    info = type("Info", (), {"id": number, "num_workers": workers})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("storage.streaming.stream.get_worker_info", lambda: info)
        yield from pipeline


def interleaved(parts: list[list]) -> list:
    return [part[turn] for turn in range(max(map(len, parts))) for part in parts if turn < len(part)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 2, len(SHARDS) + 1])
def test_a_data_loader_gives_the_same_batches_for_any_number_of_workers(data, workers):
    config = StreamConfig(seed=5, batch_size=6, microbatch_size=2, bucket_by_length=True)
    alone = list(stream(data, config, start_step=1))
    loaded = list(DataLoader(stream(data, config, start_step=1), batch_size=None, num_workers=workers))
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
            expected, maps = shard.read(shard.keys.index(sample.key), layers=[3])
            assert sample.record["id"] == f"id-{sample.key}"
            assert sample.targets.key == sample.key == expected.key
            assert torch.equal(sample.targets.logits_RQ, expected.logits_RQ)
            assert (sample.maps is None) == (maps is None) == (expected.map_row is None)
            if sample.maps is not None:
                assert torch.equal(sample.maps.codes_LC, maps.codes_LC)
            assert all(sample.key.encode() in image for image in sample.images)
    for batch in stream(data, StreamConfig(seed=0, batch_size=4), with_maps=False):
        assert all(sample.maps is None for sample in batch)


def test_resuming_reads_nothing_of_what_came_before(data, tmp_path):
    config = StreamConfig(seed=0, shuffle_shards=1, batch_size=3)
    first_shard = int(epoch_order(whole(SIZES), 0, 0, 1)[0, 0])
    rest = keys_of(stream(data, config, start_step=4))
    sizes = shard_sizes(TargetStore.open(data / "targets"))
    assert sizes == SIZES
    targets = TargetStore.open(data / "targets")
    opened = []

    class Watched(TargetStore):
        def shard(self, index):
            opened.append(index)
            return super().shard(index)

    watched = Watched(targets.store, targets.manifest, targets.commits)
    found = target_stream(data / "samples", watched, config, rank=0, world_size=1, epoch=0, start_step=4)
    assert keys_of(found) == rest
    assert first_shard not in opened
    assert len(opened) == len(set(opened))


def test_a_member_table_is_read_once_when_its_shard_is_opened(data, monkeypatch):
    read, asked = LocalStore.read, []
    monkeypatch.setattr(LocalStore, "read", lambda self, path, *rest: [asked.append(path), read(self, path, *rest)][1])
    list(stream(data, StreamConfig(seed=0, batch_size=4)))
    tables = [path for path in asked if path.startswith("samples-")]
    assert sorted(tables) == [f"samples-{shard:06d}.json" for shard in SIZES]


def test_targets_of_other_samples_are_refused(data, tmp_path):
    pack(tmp_path / "samples", (3,))
    config = StreamConfig(seed=0, batch_size=1)
    with pytest.raises(FingerprintMismatch, match="differs in: samples"):
        target_stream(tmp_path / "samples", data / "targets", config)


def test_an_unfinished_extraction_is_refused_unless_allowed(tmp_path):
    extract(pack(tmp_path / "samples", (3, 2)), open_store(tmp_path / "targets"))
    (tmp_path / "targets/commits/000001.json").unlink()
    with pytest.raises(UserError, match=r"1 of 2 shards committed .*missing: \[1\]"):
        stream(tmp_path, StreamConfig(seed=0, batch_size=1))
    allowed = stream(tmp_path, StreamConfig(seed=0, shuffle_shards=0, batch_size=9, allow_incomplete=True))
    assert keys_of(allowed) == [["s0-0", "s0-1", "s0-2"]]


def test_targets_whose_keys_are_not_the_tars_are_an_error(tmp_path):
    packed = pack(tmp_path / "samples", (3,))
    first, second, third = packed.members(0)
    swapped = (first._replace(key=second.key), second._replace(key=first.key), third)
    shutil.copytree(tmp_path / "samples", tmp_path / "other")
    write_table(tmp_path / "other", table_to_bytes(swapped))
    other = SampleSet.open(tmp_path / "other")
    assert other.index.digest == packed.index.digest
    extract(other, open_store(tmp_path / "targets"))
    with pytest.raises(CorruptData, match=r"are not the 3 of samples-000000\.tar"):
        list(stream(tmp_path, StreamConfig(seed=0, batch_size=1)))


def test_a_rank_outside_the_world_is_refused(data):
    with pytest.raises(ValueError, match="rank is 2 of 2"):
        stream(data, StreamConfig(seed=0, batch_size=1), rank=2, world_size=2)


class SlowShard:
    """Stands for a shard that takes until `ready` to open."""

    def __init__(self) -> None:
        self.begun, self.ready, self.closed = threading.Event(), threading.Event(), threading.Event()

    def close(self) -> None:
        self.closed.set()


def test_shards_are_opened_side_by_side_and_closed_once_nothing_needs_them():
    shards = [SlowShard() for _ in range(4)]

    def open_shard(number: int) -> SlowShard:
        shards[number].begun.set()
        assert shards[number].ready.wait(60)
        return shards[number]

    assert OPENING_THREADS >= 2
    opened = OpenShards(open_shard)
    opened.need([0, 1])
    # The second is there while the first still opens.
    shards[1].ready.set()
    assert opened[1] is shards[1]
    shards[0].ready.set()
    assert opened[0] is shards[0]
    opened.need([1, 2])
    assert shards[0].closed.is_set()
    assert shards[2].begun.wait(60)
    # No longer needed while it opens: closed as soon as it is open.
    opened.need([1, 3])
    shards[2].ready.set()
    assert shards[2].closed.wait(60)
    shards[3].ready.set()
    assert opened[3] is shards[3]
    assert not shards[1].closed.is_set()
    opened.close()
    assert all(shard.closed.wait(60) for shard in shards)


def test_shards_are_asked_for_a_group_ahead_of_their_first_row_also_over_the_end_of_an_epoch(data, monkeypatch):
    config = StreamConfig(seed=0, shuffle_shards=2, batch_size=2)
    mixture = Mixture([Source(SampleSet.open(data / "samples"), TargetStore.open(data / "targets"))], config)
    asked: list[list[int]] = []
    need = OpenShards.need

    def watched(self: OpenShards, shards) -> None:
        asked.append(list(shards))
        need(self, asked[-1])

    monkeypatch.setattr(OpenShards, "need", watched)
    steps = keys_of(mixture_stream(mixture, rank=0, world_size=1, epochs=range(2)))
    assert len(asked) == len(steps) + 1
    assert asked[-1] == []
    order = np.concatenate([mixture.order(0), mixture.order(1)])[:, 0].tolist()
    first = 0
    for step, shards in zip(steps, asked, strict=False):
        assert shards == list(dict.fromkeys(order[first : first + 2 + mixture.group_rows]))
        # The next epoch's rows follow at once; only the last step of an epoch may have fewer than two.
        first += len(step)
    assert mixture.group_rows == round(15 * 2 / 4 + 0.5)


@pytest.mark.parametrize("side", ["samples", "targets"])
def test_a_flipped_byte_names_the_shard_and_the_command_that_looks_for_more(side, tmp_path):
    extract(pack(tmp_path / "samples", (3, 4)), open_store(tmp_path / "targets"))
    if side == "samples":
        file, name = tmp_path / "samples/samples-000001.tar", r"samples-000001\.tar, sample s1-"
    else:
        (file,) = (tmp_path / "targets").glob("shards/000001-*.zarr/map_codes/c/0/0")
        name = r"shard 1 of .*: map_codes"
    damaged = bytearray(file.read_bytes())
    # The first JSON member's text in a tar, codes of the first map in a shard.
    damaged[520 if side == "samples" else 40] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(CorruptData, match=name) as caught:
        list(stream(tmp_path, StreamConfig(seed=0, batch_size=7)))
    assert f"`cdp verify {tmp_path}/targets --samples {tmp_path}/samples`" in str(caught.value)
