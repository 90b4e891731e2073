from functools import partial
from pathlib import Path

import pytest

from benchmarks.driver_scale import (
    FILES,
    OPEN,
    alone,
    bytes_a_part,
    give_out,
    growth,
    measure,
    start,
    sum_records,
    write_index,
)
from storage.samples.index import SampleIndex
from storage.stores import open_store
from storage.targets.store import TargetStore

NUM_SHARDS = 20


def test_every_step_is_measured_and_works_on_what_its_name_says(tmp_path: Path) -> None:
    figures = dict(measure(NUM_SHARDS, tmp_path, repeats=1))
    assert {OPEN.format(number) for number in FILES} < figures.keys()
    assert all(taken["cpu_s"] > 0 and taken["bytes"] >= 0 for taken in figures.values())
    targets, num_done = tmp_path / "targets", 19
    assert len(TargetStore.open(targets).commits) == num_done
    assert start(targets, NUM_SHARDS) == [19]
    assert start(tmp_path / "empty", NUM_SHARDS) == list(range(NUM_SHARDS))
    assert sum_records(targets) == (num_done * 16, num_done * FILES[1] * 4096)
    assert give_out(200).tries.keys() == {0, 100}


def test_the_index_that_is_loaded_has_distinct_shards(tmp_path: Path) -> None:
    write_index(tmp_path / "samples", NUM_SHARDS, 3)
    index = SampleIndex.load(open_store(tmp_path / "samples"))
    assert len({entry.name for entry in index.shards}) == len({entry.sha256 for entry in index.shards}) == NUM_SHARDS
    assert index.num_samples == NUM_SHARDS * 3


def test_the_memory_of_a_step_is_its_peak_though_it_lets_go_of_it() -> None:
    size = 64 * 2**20
    assert alone(partial(_for_a_moment, size))["bytes"] == pytest.approx(size, rel=0.1)


def _for_a_moment(size: int) -> int:
    return len(bytearray(b"x") * size)


def test_a_step_whose_process_dies_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="died"):
        alone(partial(open_store, "no-such-scheme://x"))


def test_growth_is_between_the_largest_two_numbers_of_shards() -> None:
    steps = {
        10: {"a": {"cpu_s": 9.0, "bytes": 0.0}},
        100: {"a": {"cpu_s": 1.0, "bytes": 500.0}},
        1000: {"a": {"cpu_s": 10.0, "bytes": 5000.0}},
    }
    assert growth(steps) == {
        "a": {"shards": [100, 1000], "times_the_cpu_s": 10.0, "cpu_us_a_shard": 10_000.0, "bytes_a_shard": 5.0}
    }
    both = {10: {"has 2": {"bytes": 1000.0}, "has 8": {"bytes": 1600.0}}, 100: {"has 2": {"bytes": 1.0}}}
    assert bytes_a_part(both, "has {}", (2, 8)) == {"shards": 10, "bytes": 10.0}
