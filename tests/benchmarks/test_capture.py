import json
import sys
from pathlib import Path

import torch

from benchmarks.capture import WAYS, Bench, Shape, main, measure

TINY = Shape(
    layers=3, captured=2, hidden=32, intermediate=48, heads=4, kv_heads=2, vocab=50, patches=5, tokens=40, batch=2
)


def test_the_benchmark_compares_maps_that_are_equal_and_reports_ratios() -> None:
    result = measure(TINY, torch.device("cpu"), 2, {})
    assert result["shape"]["image_tokens"] == 24
    assert result["shape"]["captured_layers"] == [1, 2]
    assert 0 < result["largest_difference_from_eager"] < 4.5e-8
    assert result["clock"] == "cpu_s"
    assert result["clocks"].keys() == {"cpu_s", "wall_s"}
    assert all(clock["seconds"].keys() == set(WAYS) for clock in result["clocks"].values())
    assert result["capture_over_sdpa"] == result["clocks"]["cpu_s"]["capture_over_sdpa"]
    assert min(result["capture_over_sdpa"], result["eager_over_sdpa"]) > 0


def test_only_capture_and_eager_give_maps() -> None:
    bench = Bench(TINY, torch.device("cpu"))
    assert bench.run("sdpa") == {}
    assert bench.run("capture").keys() == bench.run("eager").keys() == set(bench.layers)


def test_the_memory_of_maps_of_all_heads_is_seen() -> None:
    shape = Shape(layers=2, captured=1, hidden=64, intermediate=64, heads=16, kv_heads=4, vocab=50, tokens=760)
    maps = 4 * shape.layers * shape.heads * shape.tokens**2
    assert 0.9 * maps < Bench(shape, torch.device("cpu")).peak_bytes("eager") < 4 * maps


def test_the_results_file_names_hardware_date_and_command(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("benchmarks.capture.measure_memory", lambda shape: {})
    flags = "--layers 1 --captured 1 --hidden 16 --intermediate 16 --heads 2 --kv-heads 1 --patches 3 --tokens 12"
    out = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["capture.py", *flags.split(), "--repeats", "1", "--out", str(out)])
    main()
    saved = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == saved
    assert saved["command"] == f"python -m benchmarks.capture {flags} --repeats 1"
    assert saved["device"] == "cpu"
    assert saved["date"] > "2026"
    assert "cores" in saved["hardware"]
