"""The saved results hold what the documents claim of maps of cells, and the benchmark runs."""

import json

import pytest

from benchmarks.attention_maps import synthetic_maps
from benchmarks.map_pooling import measure
from benchmarks.results import RESULTS


@pytest.mark.parametrize("codec", ["float16", "sqrt8", "sqrt4", "sqrt2"])
def test_the_saved_results_hold_what_the_documents_claim(codec: str) -> None:
    saved = json.loads((RESULTS / "map_pooling.json").read_text())["synthetic"]
    assert (saved["image_tokens"], saved["cells"]) == (728, 196)
    found = saved["codecs"][codec]
    assert 11 < found["smaller"] < 13
    assert found["gradient_cosine_of_cells"]["worst_layer"] > 0.9996
    assert 0.36 < found["gradient_cosine_of_tokens"]["layers_median"] < 0.37


def test_it_runs_on_small_maps() -> None:
    found = measure(synthetic_maps(24, 1))
    assert found["cells"] == 9
    assert found["codecs"]["float16"]["gradient_cosine_of_cells"]["worst_layer"] > 0.99
