from pathlib import Path

import pytest

from benchmarks.rounding import make_samples, measure


@pytest.mark.slow
def test_a_rerun_changes_nothing_and_another_kernel_little(tmp_path: Path) -> None:
    result = measure("bfloat16", make_samples(tmp_path, 3), "sqrt8")
    assert result["maps"] == 3
    assert set(result["rerun"].values()) == {0.0}
    assert 0 < result["other_kernel"]["codes_that_differ"] < 1
    assert result["other_kernel"]["mask_bits_that_differ"] < 0.1
