import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.attention_alternatives import measure_alternatives
from benchmarks.attention_codes import CODECS, main, measure, query_gradients
from benchmarks.attention_maps import bundled_teacher_maps, synthetic_maps
from benchmarks.attention_variants import VARIANTS
from benchmarks.results import RESULTS


def test_synthetic_maps_are_causal_attention_of_the_layers_a_teacher_of_40_has() -> None:
    data = synthetic_maps(40, num_samples=1)
    (maps,) = data.maps
    assert maps.shape == (11, 40, 40)
    assert [len(window) for window in data.windows] == [5] * 7
    assert not maps.triu(1).any()
    assert bool((maps.sum(-1) < 1).all()), "text keys take their share"
    assert torch.equal(maps, synthetic_maps(40, num_samples=2).maps[0])


def test_more_bits_are_more_bytes_and_a_closer_gradient() -> None:
    result = measure(synthetic_maps(40, num_samples=1), repeats=1)["codecs"]
    assert list(result) == list(CODECS) == ["float16", "sqrt8", "sqrt4", "sqrt2"]
    for name in ("gradient_cosine", "gradient_cosine_of_unforeseen_windows"):
        assert result["float16"][name]["layers_median"] > 0.999
    exact = [result[name]["gradient_cosine"]["layers_median"] for name in CODECS]
    assert exact == sorted(exact, reverse=True)
    assert exact[2] > 0.99
    sizes = [result[name]["bytes_by_array"]["map_codes"] for name in CODECS]
    assert sizes == sorted(sizes, reverse=True)
    for codec in result.values():
        assert codec["bytes_a_sample"] == pytest.approx(sum(codec["bytes_by_array"].values()), abs=10)
        assert {"map_caps", "window_flips", "window_shifts", "window_thresholds"} < codec["bytes_by_array"].keys()
        assert codec["encode_over_float16"] > 0


def test_alternatives_are_measured_beside_what_is_stored() -> None:
    found = measure_alternatives(synthetic_maps(40, num_samples=3), query_gradients)
    stored = found["values"]["4 bits, as stored"]
    assert stored["gradient_cosine"] > found["values"]["4 bits, columns not shifted"]["gradient_cosine"]
    coders = found["coders_of_4_bit_codes"]
    assert coders["zstd 1, as stored"]["decompress_over_stored"] == 1
    assert coders["entropy given the codes left and above"]["bytes"] < coders["entropy of single codes"]["bytes"]
    assert 0 < found["masks_at_4_bits"]["share of entries that are flips"] < 0.2


def test_the_bundled_teachers_maps_are_those_of_drawn_scenes() -> None:
    data = bundled_teacher_maps(2)
    assert [maps.shape for maps in data.maps] == [(5, 36, 36)] * 2
    assert data.windows == ((2, 3, 4), (3, 4, 5), (4, 5, 6))
    assert not torch.equal(*data.maps)


TARGETS = {"sqrt8": (2.8e6, 0.99999), "sqrt4": (1.4e6, 0.9998), "sqrt2": (0.8e6, 0.995)}
"""Codec -> most bytes a sample of 728 image tokens and 11 layers, least cosine of the gradient."""


@pytest.mark.parametrize("codec", TARGETS)
def test_the_saved_results_reach_the_targets_in_every_sample(codec: str) -> None:
    saved = json.loads((RESULTS / "attention_codes.json").read_text())["synthetic"]
    assert saved["image_tokens"] == [728]
    assert (len(saved["layers"]), saved["samples"]) == (11, 3)
    most_bytes, least_cosine = TARGETS[codec]
    assert saved["codecs"][codec]["bytes_a_sample"] <= most_bytes
    assert saved["codecs"][codec]["gradient_cosine"]["layers_least"] >= least_cosine


def size_row(name: str, saved: dict[str, Any]) -> str:
    """Of the document's first table."""
    large, small = (saved[case]["codecs"][name] for case in ("synthetic", "scenes"))
    cells = [
        f"{large['bytes_a_sample'] / 1e6:.2f}",
        angle(large["gradient_cosine"]["layers_least"]),
        f"{small['bytes_a_sample']:,}",
        *(angle(small["gradient_cosine"][key]) for key in ("layers_median", "layers_least")),
        f"{large['encode_over_float16']:.2f}, {large['decode_over_float16']:.2f}",
    ]
    return f"| `{name}` | {' | '.join(cells)} |"


def unstored_row(name: str, saved: dict[str, Any]) -> str:
    """Of the table of windows that are not stored."""
    large, small = (
        saved[case]["codecs"][name]["gradient_cosine_of_unforeseen_windows"] for case in ("synthetic", "scenes")
    )
    cosines = (large["layers_least"], small["layers_median"], small["layers_least"])
    return f"| `{name}` | {' | '.join(f'{math.floor(1e4 * cosine) / 1e4:g}' for cosine in cosines)} |"


def angle(cosine: float) -> str:
    return f"{1 - cosine:.0e}".replace("e-0", "e-")


def variant_row(name: str, saved: dict[str, Any]) -> str:
    """Least of the synthetic samples and median of the scenes, of each variant of the loss."""
    cells = [
        f"{saved['synthetic'][name][variant]['least']:.4f}, {saved['scenes'][name][variant]['median']:.4f}"
        for variant in VARIANTS
    ]
    return f"| `{name}` | {' | '.join(cells)} |"


@pytest.mark.parametrize("codec", CODECS)
def test_the_tables_of_the_document_are_those_of_the_saved_results(codec: str) -> None:
    codes, variants = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in ("attention_codes", "attention_variants")
    )
    page = (RESULTS.parents[1] / "docs" / "codecs.md").read_text().splitlines()
    for row in (size_row(codec, codes), unstored_row(codec, codes), variant_row(codec, variants)):
        assert row in page


def test_the_saved_results_have_every_coder_that_the_documents_name() -> None:
    coders = json.loads((RESULTS / "attention_coders.json").read_text())["coders_of_4_bit_codes"]
    text = (RESULTS.parents[1] / "docs" / "codecs.md").read_text()
    for name in (
        "zstd 1, as stored",
        "zstd 19",
        "zstd 19, dictionary of other samples",
        "pcodec 8, one code in 16 bits",
    ):
        assert f"{coders[name]['bytes']:,}" in text, name


@pytest.mark.slow
def test_the_results_file_names_hardware_date_and_command(tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "results.json"
    flags = ["--image-tokens", "12", "--samples", "1", "--scenes", "1", "--repeats", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["attention_codes.py", *flags])
    main()
    saved = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == saved
    assert saved["command"].startswith("python -m benchmarks.attention_codes --image-tokens 12")
    assert {"date", "hardware", "synthetic", "scenes", "alternatives"} < saved.keys()
