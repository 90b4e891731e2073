from pathlib import Path

import pytest

from benchmarks.extraction import WAYS, Size, measure

TINY = Size(layers=3, hidden=16, heads=2, patches=3, images=4, samples_per_shard=4, batch_size=2)


@pytest.mark.slow
def test_each_way_sees_every_sample_and_the_overlapped_one_says_how_long_the_teacher_waited(tmp_path: Path) -> None:
    result = measure(TINY, tmp_path, repeats=1, threads=1)
    assert result["samples"] >= TINY.images
    assert result["shards"] > 1
    assert result["samples_per_s"].keys() == set(WAYS)
    assert result["rate_over_forward_loop"].keys() == result["processor_over_forward_loop"].keys() == set(WAYS)
    assert result["processor_over_forward_loop"]["overlapped"] > 1 == result["rate_over_forward_loop"]["forward_loop"]
    assert 0 < result["teacher_waited_share"] < 1
