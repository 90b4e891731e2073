import json
from pathlib import Path

import pytest

from benchmarks import loader
from benchmarks.loader import Shape, make_store, measure_resume, padding_saved, shuffle_quality
from benchmarks.results import RESULTS

TINY = Shape(shards=3, samples=4, image_tokens=20, distinct_maps=1, answer_rows=4, image_side=64)


def test_more_mixed_shards_part_neighbours_and_a_full_permutation_parts_them_most() -> None:
    found = shuffle_quality(num_shards=32, size=64, batch=16)["shuffle_shards"]
    apart = [each["mean_samples_apart"] for each in found.values()]
    assert apart == sorted(apart)
    assert found["0"]["mean_samples_apart"] == 1
    assert found["full permutation"]["mean_samples_apart"] == pytest.approx(32 * 64 / 3, rel=0.1)
    assert found["8"]["mean_samples_apart"] == pytest.approx(8 * 64 / 3, rel=0.1)


def test_dealing_by_length_saves_padding() -> None:
    found = padding_saved(TINY, num_samples=1024)
    for ranks in (1, 8):
        shares = found[f"padding_share_{ranks}_ranks"]
        assert 0 < shares["by_length"] < shares["as_they_come"] / 2


@pytest.mark.slow
def test_the_synthetic_store_is_read_and_resumed(tmp_path: Path) -> None:
    make_store(tmp_path, TINY)
    mixture = loader._mixture(tmp_path / "samples", tmp_path / "targets", batch_size=5)
    rates = loader._rate(lambda: loader._loaded(mixture, 0), 1e6)
    assert rates["mb_per_s"] == pytest.approx(rates["samples_per_s"])
    (found,) = loader.measure_waiting(mixture, [(100, 0)])
    assert 0 < found["wait_share"] < 1
    found = measure_resume(tmp_path, repeats=1)
    assert found["steps_an_epoch"] == TINY.shards * TINY.samples
    assert min(found["median_s"].values()) > 0


def test_the_saved_result_holds_the_shuffle_quality_that_the_documents_claim() -> None:
    saved = json.loads((RESULTS / "loader.json").read_text())["shuffle"]
    assert (saved["shards"], saved["samples_a_shard"], saved["batch"]) == (1300, 512, 128)
    shares = {name: each["neighbours_in_one_batch"] for name, each in saved["shuffle_shards"].items()}
    document = (RESULTS.parents[1] / "docs/training.md").read_text()
    for mixed, printed in {"8": "3.1 %", "1": "25 %", "32": "0.78 %", "full permutation": "0.02 %"}.items():
        assert f"{100 * shares[mixed]:.2g} %" == printed
        assert printed in document


def test_the_saved_result_holds_the_waiting_that_the_documents_claim() -> None:
    saved = json.loads((RESULTS / "loader.json").read_text())["waiting"]
    document = (RESULTS.parents[1] / "docs/training.md").read_text()
    shares = [100 * each["wait_share"] for each in saved]
    paces = [(each["samples_per_s"], each["loader_processes"]) for each in saved]
    assert paces == [(12.5, 1), (25, 1), (25, 2), (50, 2)]
    for share in (shares[0], shares[1], shares[3]):
        assert f"{share:.1f} %" in document
    assert shares[0] < 2


def test_the_saved_result_shows_that_resuming_does_not_depend_on_the_position() -> None:
    seconds = json.loads((RESULTS / "loader.json").read_text())["resume"]["median_processor_s"]
    assert seconds["99%"] < 2 * seconds["1%"]
