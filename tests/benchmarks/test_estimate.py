import json
from pathlib import Path

import pytest

from benchmarks.estimate import compare
from benchmarks.results import RESULTS
from pipeline.demo.scenes.dataset import write_dataset
from stages.estimate.report import EstimateConfig
from stages.samples.pack import pack_samples

NEARNESS = 0.15


@pytest.mark.slow
def test_estimate_and_extraction_are_compared_in_bytes_and_by_both_clocks(tmp_path: Path) -> None:
    write_dataset(tmp_path / "scenes", 8, 0, "shapes", 1)
    pack_samples(tmp_path / "scenes/train.json", tmp_path / "scenes", tmp_path / "samples")
    result = compare(tmp_path, "sqrt4", 1, EstimateConfig())
    (each,) = result["each"]
    for name, found in (("processor_s", "found_processor_s"), ("wall_s", "found_wall_s"), ("bytes", "found_bytes")):
        assert result["estimated_over_found"][name] == pytest.approx(each[f"estimated_{name}"] / each[found])
        assert each[found] > 0


@pytest.mark.parametrize("codec", ["sqrt4", "float16"])
def test_the_saved_results_hold_what_the_documents_claim(codec: str) -> None:
    saved = json.loads((RESULTS / "estimate.json").read_text())[codec]
    assert saved["samples"] > 1000
    assert saved["num_sampled"] < saved["samples"]
    for name in ("bytes", "processor_s"):
        assert saved["estimated_over_found"][name] == pytest.approx(1, abs=NEARNESS), name
