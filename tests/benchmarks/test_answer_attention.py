"""The cost of answer attention: a short run, and what the saved figures say in the documents."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.answer_attention import CASES, CODECS, compare_sinks, compute_large, measure_scenes
from benchmarks.attention_maps import synthetic_maps
from benchmarks.results import RESULTS
from tests.docs.markdown import ROOT


@pytest.mark.slow
def test_bytes_of_the_bundled_example_are_measured_in_stores(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    found = measure_scenes(tmp_path, images=6, repeats=1)
    assert found["processor_time_over_without"] > 0
    for codec in CODECS:
        assert 0 < found[codec]["answer_attention_bytes"] < found[codec]["store_bytes"]


def test_shares_of_a_large_sample_grow_with_its_answers_and_sinks_are_nearly_those_of_exact_values() -> None:
    data = synthetic_maps(100, 2)
    found = compute_large(data)
    assert found["share"].keys() == {f"{codec}, {case}" for codec in CODECS for case in CASES}
    # Some of the 11 layers of 100 values in 16 bits are saved by zstd.
    assert 0.6 * 11 * 100 * 2 < found["bytes_an_answer"] < 1.1 * 11 * 100 * 2
    sinks = compare_sinks(data)
    assert sinks["other_sinks"] <= 0.01 * sinks["entries"]
    assert sinks["gradient_cosine_least"] > 0.99


def test_the_saved_shares_are_those_of_the_document() -> None:
    saved = json.loads((RESULTS / "answer_attention.json").read_text())
    text = (ROOT / "docs" / "codecs.md").read_text()
    for case in CASES:
        row = " | ".join(f"{saved['synthetic']['share'][f'{codec}, {case}']:.1%}" for codec in CODECS)
        assert f"| {case} | {row} |" in text
    small = " | ".join(f"{saved['scenes'][codec]['share']:.0%}" for codec in CODECS)
    assert f"| bundled example, 36 image tokens | {small} |" in text
    assert f"{saved['scenes']['processor_time_over_without']:.2f} times the processor time" in text
