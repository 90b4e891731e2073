"""Several stores in one order: exact counts for each, budgets, subsets, and the refusal of what does not fit."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from storage.codecs.codec_settings import MapCodecConfig
from storage.errors import FingerprintMismatch, UserError
from storage.samples.sample_set import SampleSet
from storage.stores import open_store
from storage.streaming.mixture import Mixture, Source
from storage.streaming.order import StreamConfig
from storage.streaming.source_checks import read_keys
from storage.streaming.stream import mixture_stream
from storage.targets.store import TargetStore
from tests.storage.builders import extract, pack

LARGE, SMALL = (7, 6, 7), (3, 4)
SKIP = ("s0-2",)
CONFIG = StreamConfig(seed=4, shuffle_shards=2, batch_size=5)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 19 samples and one of 7, which were cut at other lengths."""
    root = tmp_path_factory.mktemp("mixture")
    extract(pack(root / "large", LARGE), open_store(root / "large-targets"), skip=SKIP)
    extract(pack(root / "small", SMALL), open_store(root / "small-targets"), max_length=64, dtype="bfloat16")
    return root


def source(root: Path, name: str, weight: float = 1.0, subset: Path | None = None) -> Source:
    return Source(SampleSet.open(root / name), TargetStore.open(root / f"{name}-targets"), weight, subset)


def counts(mixture: Mixture, epoch: int) -> list[Counter[tuple[int, int]]]:
    """How often each (shard, row) comes, for each source."""
    found: list[Counter[tuple[int, int]]] = [Counter() for _ in mixture.sources]
    for shard, row in mixture.order(epoch).tolist():
        number, shard = mixture.locate(shard)
        found[number][shard, row] += 1
    return found


def test_one_order_goes_over_all_stores_and_has_every_sample_of_weight_one_once(data):
    mixture = Mixture([source(data, "large"), source(data, "small")], CONFIG)
    assert mixture.num_samples == 26
    assert mixture.num_steps == 6
    large, small = counts(mixture, 0)
    assert set(large.values()) == set(small.values()) == {1}
    assert (large.total(), small.total()) == (19, 7)
    stores = [mixture.locate(shard)[0] for shard in mixture.order(0)[:, 0].tolist()]
    assert stores not in (sorted(stores), sorted(stores, reverse=True))


@pytest.mark.parametrize("weight", [0.01, 0.3, 0.5, 1.0, 1.5, 2.0, 2.3])
def test_a_weight_is_so_many_passes_exactly_in_every_epoch(data, weight):
    mixture = Mixture([source(data, "large"), source(data, "small", weight)], CONFIG)
    expected = max(1, round(weight * 7))
    total: Counter[tuple[int, int]] = Counter()
    for epoch in range(7):
        large, small = counts(mixture, epoch)
        assert set(large.values()) == {1}
        assert small.total() == expected
        # Nothing comes once more before all else came as often.
        each = [small[key] for key in counts(Mixture([source(data, "small")], CONFIG), 0)[0]]
        assert max(each) - min(each) <= 1
        assert mixture.num_samples == 19 + expected == len(mixture.order(epoch))
        total += small
    # An epoch takes first what the ones before it left.
    assert max(total.values()) - min(total.get(key, 0) for key in total) <= 2
    assert len(total) == min(7, 7 * expected)


def test_a_half_is_followed_by_the_other_half_then_by_another_cut(data):
    mixture = Mixture([source(data, "small", 3 / 7), source(data, "large")], CONFIG)
    halves = [frozenset(counts(mixture, epoch)[0]) for epoch in range(6)]
    assert all(len(half) == 3 for half in halves)
    assert not halves[0] & halves[1]
    assert len(set(halves)) > 2
    again = Mixture([source(data, "small", 3 / 7), source(data, "large")], CONFIG)
    assert [frozenset(counts(again, epoch)[0]) for epoch in range(6)] == halves
    other = Mixture([source(data, "small", 3 / 7)], CONFIG.model_copy(update={"seed": 5}))
    assert [frozenset(counts(other, epoch)[0]) for epoch in range(6)] != halves


def test_a_shard_that_comes_twice_is_mixed_with_others_in_each_of_its_turns(data):
    mixture = Mixture([source(data, "small", 2.0)], CONFIG.model_copy(update={"shuffle_shards": 1}))
    order = mixture.order(0).tolist()
    turns = []
    while order:
        shard = order[0][0]
        turn, order = order[: SMALL[shard]], order[SMALL[shard] :]
        assert sorted(turn) == [[shard, row] for row in range(SMALL[shard])]
        turns.append(shard)
    assert sorted(turns) == [0, 0, 1, 1]


def test_the_stream_of_a_mixture_reads_each_sample_from_its_own_store(data):
    mixture = Mixture([source(data, "large"), source(data, "small", 2.0)], CONFIG)
    read = [sample for batch in mixture_stream(mixture, rank=0, world_size=1, epochs=range(1)) for sample in batch]
    assert len(read) == 19 + 14
    expected = []
    for shard, row in mixture.order(0).tolist():
        number, shard = mixture.locate(shard)
        expected.append(mixture.sources[number].targets.shard(shard).read(row)[0])
    assert [sample.key for sample in read] == [sample.key for sample in expected]
    for found, wanted in zip(read, expected, strict=True):
        assert found.targets.token_ids.equal(wanted.token_ids)
        assert found.targets.logits_RQ.equal(wanted.logits_RQ)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"teacher_weights": "x" * 64}, "teacher_weights"),
        ({"tokenizer": "x" * 64}, "tokenizer"),
        ({"layers": (1, 2, 3), "windows": ((1, 2), (2, 3))}, "layers, windows"),
        ({"map_codec": MapCodecConfig(name="sqrt8")}, "map_codec.cap_factor, map_codec.name"),
        ({"teacher_config": {"model_type": "llava"}}, "teacher_config.text_config"),
    ],
)
def test_stores_that_differ_in_what_a_student_needs_are_refused_by_field(data, tmp_path, changes, named):
    extract(SampleSet.open(data / "small"), open_store(tmp_path / "targets"), **changes)
    other = Source(SampleSet.open(data / "small"), TargetStore.open(tmp_path / "targets"))
    with pytest.raises(FingerprintMismatch, match=r"cannot be mixed \(differs in: ([^)]*)\)") as caught:
        Mixture([source(data, "large"), other], CONFIG)
    assert f"differs in: {named})" in str(caught.value)


@pytest.mark.parametrize("budget", [1, 4, 25])
def test_a_budget_is_so_many_different_samples_the_same_in_each_epoch(data, budget):
    config = CONFIG.model_copy(update={"max_samples": budget})
    sources = [source(data, "large"), source(data, "small")]
    mixture = Mixture(sources, config)
    epochs = [{tuple(row) for row in mixture.order(epoch).tolist()} for epoch in range(3)]
    assert mixture.num_samples == budget
    assert len(epochs[0]) == budget
    assert epochs[0] == epochs[1] == epochs[2]
    other = Mixture(sources, config.model_copy(update={"seed": 9}))
    assert {tuple(row) for row in other.order(0).tolist()} != epochs[0]
    doubled = Mixture([source(data, "large", 2.0), source(data, "small", 2.0)], config)
    assert {tuple(row) for row in doubled.order(0).tolist()} == epochs[0]
    assert doubled.num_samples == 2 * budget


def test_a_budget_larger_than_the_data_takes_all(data):
    config = CONFIG.model_copy(update={"max_samples": 10**9})
    sources = [source(data, "large")]
    assert np.array_equal(Mixture(sources, config).order(1), Mixture(sources, CONFIG).order(1))


def test_a_subset_is_the_listed_samples_of_its_store(data, tmp_path):
    keys = ["s2-6", "s0-3", "s1-0"]
    listed = tmp_path / "keys.txt"
    listed.write_text("\n".join([*keys, "", keys[0]]) + "\n")
    mixture = Mixture([source(data, "large", 2.0, listed), source(data, "small")], CONFIG)
    read = [s.key for batch in mixture_stream(mixture, rank=0, world_size=1, epochs=range(1)) for s in batch]
    small = [f"s{shard}-{row}" for shard, size in enumerate(SMALL) for row in range(size)]
    assert sorted(read) == sorted([*keys, *keys, *small])


def test_a_byte_order_mark_is_no_part_of_a_subsets_first_key(tmp_path):
    listed = tmp_path / "keys.txt"
    listed.write_text("s2-6\ns0-3\n", encoding="utf-8-sig")
    assert read_keys(listed) == {"s2-6", "s0-3"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s0-1\nnobody\ns0-2\n", r"names 3 samples, .*large-targets has no targets for 2 of them: nobody, s0-2;"),
        ("\n".join(f"no-{n}" for n in range(9)), r"for 9 of them: no-0, no-1, no-2, no-3, no-4, \.\.\.;"),
        (" \n", "names no sample"),
        (None, "cannot be read"),
    ],
)
def test_a_subset_that_cannot_be_used_is_refused(data, tmp_path, text, message):
    listed = tmp_path / "keys.txt"
    if text is not None:
        listed.write_text(text)
    with pytest.raises(UserError, match=message):
        Mixture([source(data, "large", subset=listed)], CONFIG)


def test_what_a_source_is_follows_content_and_not_places(data, tmp_path):
    lists = [tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "c.txt"]
    for path, text in zip(lists, ("s0-1\ns1-1\n", "s1-1\n\ns0-1", "s1-1\n"), strict=True):
        path.write_text(text)
    first, same, other = (source(data, "large", subset=path).description() for path in lists)
    assert first == same
    assert first != other
    assert first["num_samples"] == 19
    assert source(data, "large", 0.5).description() != source(data, "large").description()
    assert source(data, "small").description()["targets"] != first["targets"]
