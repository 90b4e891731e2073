"""The comparison of training from stored targets with the teacher in the loop, in a short run."""

from pathlib import Path

import pytest
import torch

from benchmarks.cached_against_online import Bench, Kept, Online


@pytest.mark.slow
def test_distilled_fine_tuning_from_16_bit_targets_follows_training_with_the_teacher_in_the_loop(
    tmp_path: Path,
) -> None:
    torch.set_num_threads(1)
    bench = Bench(tmp_path, images=12, stores=["16 bits"])
    online, cached = (bench.train("dft", 10, "16 bits", objective) for objective in (Online, Kept))
    assert cached.terms == ["loss", "lm", "kd", "attention"]
    assert online.steps[-1]["loss"] < 0.9 * online.steps[0]["loss"], "something is learnt"
    found = cached.against(online)
    # Roundings of float32, but of the maps those of 16 bits.
    for name, bound in (("lm", 1e-5), ("kd", 1e-5), ("attention", 1e-4), ("loss", 1e-5)):
        assert found["terms"][name]["largest"] < bound, name
    assert found["weights_apart_of_way_moved"] < 5e-3
