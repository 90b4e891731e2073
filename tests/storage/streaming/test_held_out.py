"""Samples that are held out: in no epoch, each once in what is measured, chosen by their keys alone."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from storage.errors import UserError
from storage.samples.sample_set import SampleSet
from storage.stores import open_store
from storage.streaming.held_out import HeldOut
from storage.streaming.mixture import Mixture, Source
from storage.streaming.order import StreamConfig
from storage.streaming.stream import mixture_stream
from storage.targets.store import TargetStore
from tests.storage.builders import extract, pack

LARGE, SMALL = (7, 6, 7), (3, 4)
"""Samples of the shards; keys are `s0-0`, `s0-1`, ..., so those of the smaller set are also keys of the larger one."""
SKIPPED = "s0-2"
CONFIG = StreamConfig(seed=4, shuffle_shards=2, batch_size=5, microbatch_size=2)
THIRD = HeldOut("share", share=0.3, seed=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 19 samples and one of 7."""
    root = tmp_path_factory.mktemp("held-out")
    extract(pack(root / "large", LARGE), open_store(root / "large-targets"), skip=(SKIPPED,))
    extract(pack(root / "small", SMALL), open_store(root / "small-targets"))
    return root


def source(root: Path, name: str, weight: float = 1.0, subset: Path | None = None) -> Source:
    return Source(SampleSet.open(root / name), TargetStore.open(root / f"{name}-targets"), weight, subset)


def listed(*keys: str) -> HeldOut:
    return HeldOut("keys", keys=frozenset(keys))


def read(mixture: Mixture, epoch: int = 0, world_size: int = 1) -> list[str]:
    """The keys of an epoch, those of one rank after another."""
    return [
        sample.key
        for rank in range(world_size)
        for batch in mixture_stream(mixture, rank=rank, world_size=world_size, epochs=range(epoch, epoch + 1))
        for sample in batch
    ]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 0.5)])
@pytest.mark.parametrize("held_out", [THIRD, listed("s0-1", "s2-6", "s1-3")], ids=["share", "keys"])
def test_no_epoch_has_a_held_out_sample_and_each_of_them_is_measured_once(data, weights, held_out):
    sources = [source(data, "large", weights[0]), source(data, "small", weights[1])]
    everything = [read(Mixture([replaced], CONFIG)) for replaced in (source(data, "large"), source(data, "small"))]
    mixture = Mixture(sources, CONFIG, held_out)
    apart = mixture.held_out()
    assert sorted(read(apart)) == sorted(key for keys in everything for key in keys if key in held_out)
    assert sorted(read(apart, world_size=3)) == sorted(read(apart)) == sorted(read(apart, epoch=1))
    assert apart.num_samples == len(read(apart)) > 2
    for epoch in range(3):
        trained = read(mixture, epoch)
        assert len(trained) == mixture.num_samples
        assert not any(key in held_out for key in trained)


def test_the_order_of_what_is_left_is_that_of_a_store_that_never_had_the_others(data, tmp_path):
    rest = tmp_path / "rest.txt"
    held = ("s0-1", "s1-0", "s2-2")
    mixture = Mixture([source(data, "large")], CONFIG, listed(*held))
    rest.write_text("\n".join(key for key in read(Mixture([source(data, "large")], CONFIG)) if key not in held))
    same = Mixture([source(data, "large", subset=rest)], CONFIG)
    for epoch in range(3):
        assert np.array_equal(mixture.order(epoch), same.order(epoch))


def test_the_same_samples_in_two_sources_are_held_out_of_both_and_count_once(data, tmp_path):
    some = tmp_path / "some.txt"
    some.write_text("s0-1\ns1-1\n")
    mixture = Mixture([source(data, "large"), source(data, "large", 2.0, some)], CONFIG, listed("s0-1", "s2-0"))
    assert sorted(read(mixture.held_out())) == ["s0-1", "s2-0"]
    trained = read(mixture)
    assert (trained.count("s1-1"), trained.count("s0-1"), trained.count("s0-3")) == (3, 0, 1)


def test_listed_samples_may_be_others_than_those_of_the_subset_and_a_share_is_of_the_subset(data, tmp_path):
    some = tmp_path / "some.txt"
    subset = ["s0-0", "s0-1", "s0-3", "s1-1", "s1-2", "s2-5"]
    some.write_text("\n".join(subset))
    mixture = Mixture([source(data, "large", subset=some)], CONFIG, listed("s2-0", "s0-1"))
    assert sorted(read(mixture.held_out())) == ["s0-1", "s2-0"]
    assert sorted(read(mixture)) == sorted({*subset} - {"s0-1"})
    mixture = Mixture([source(data, "large", subset=some)], CONFIG, THIRD)
    assert sorted(read(mixture.held_out()) + read(mixture)) == subset


def test_a_budget_is_drawn_from_what_is_not_held_out(data):
    config = CONFIG.model_copy(update={"max_samples": 18})
    keys = ("s0-1", "s1-0", "s2-2")
    mixture = Mixture([source(data, "large"), source(data, "small")], config, listed(*keys))
    assert mixture.num_samples == 18
    assert not {*read(mixture)} & {*keys}
    # Of the smaller set too, which has two of these keys.
    assert mixture.held_out().num_samples == 5


def test_a_share_is_that_of_many_keys_and_another_seed_is_another_choice():
    keys = [f"sample-{number}" for number in range(20_000)]
    chosen = {seed: {key for key in keys if key in HeldOut("share", 0.02, seed)} for seed in (0, 1)}
    for found in chosen.values():
        assert len(found) == pytest.approx(400, abs=80)
    assert len(chosen[0] & chosen[1]) < 40
    assert chosen[0] < {key for key in keys if key in HeldOut("share", 0.1, 0)}


def test_which_keys_a_share_holds_out_never_changes():
    # Or a stage that is resumed by a later version would be trained on what it was measured on.
    assert [number for number in range(20) if f"sample-{number}" in THIRD] == [0, 5, 7, 10, 11, 12, 13, 15, 16]


def test_what_is_held_out_reaches_loader_processes(data):
    apart = Mixture([source(data, "large")], CONFIG, THIRD).held_out()
    assert read(pickle.loads(pickle.dumps(apart))) == read(apart)


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        (
            listed("s0-1", "nobody", SKIPPED),
            r"keys names 3 samples, .*large-targets has no targets for 2 of them: nobody, s0-2 \(skipped: too_long\);",
        ),
        (listed(*(f"no-{n}" for n in range(9))), r"for 9 of them: no-0, no-1, no-2, no-3, no-4, \.\.\.;"),
        (HeldOut("share 1e-06", share=1e-6), r"share 1e-06 holds out none of 19 samples, .*; give a larger share"),
        (HeldOut("share 1", share=1.0), r"share 1 holds out all 19 samples, expected some to train on; give a smaller"),
    ],
    ids=["unknown and skipped", "many", "none", "all"],
)
def test_a_choice_that_cannot_be_used_is_refused(data, held_out, message):
    with pytest.raises(UserError, match=message):
        Mixture([source(data, "large")], CONFIG, held_out)


def test_a_key_is_looked_for_in_all_sources(data):
    mixture = Mixture([source(data, "large"), source(data, "small")], CONFIG, listed("s2-6", "s1-3"))
    assert sorted(read(mixture.held_out())) == ["s1-3", "s1-3", "s2-6"]
    with pytest.raises(UserError, match=r"large-targets, .*small-targets has no targets for 1 of them: s9-9;"):
        Mixture([source(data, "large"), source(data, "small")], CONFIG, listed("s2-6", "s9-9"))
