import json
from dataclasses import replace

import pytest
import torch

from benchmarks.results import RESULTS
from benchmarks.training_step import WAYS, Bench, Shape, measure

TINY = Shape(
    student_layers=8, student_hidden=32, student_intermediate=48, student_heads=4, teacher_layers=9, teacher_hidden=48,
    teacher_intermediate=64, teacher_heads=4, vocab=60, batch=2, lora_rank=4, tokens=70, answers=6, patches=6,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _fewer_matched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.training_step.MATCHED", 2)


def test_the_ways_of_a_step_have_the_same_loss_so_that_only_their_cost_is_compared() -> None:
    bench = Bench(TINY, torch.device("cpu"))
    losses = {way: bench.loss_of(way) for way in WAYS if way != "compiled"}
    assert losses["released"] == pytest.approx(losses["online"], rel=1e-5)
    # Few bits and small maps.
    assert losses["cached"] == pytest.approx(losses["online"], rel=2e-2)
    assert losses["supervised"] < losses["cached"] - 1


def test_every_way_trains_and_only_those_with_a_teacher_hold_it() -> None:
    bench = Bench(replace(TINY, batch=1), torch.device("cpu"))
    for way in ("supervised", "cached", "online", "released"):
        before = bench.loss_of(way)
        for _ in range(3):
            bench.step(way)
        assert bench.loss_of(way) < before, way
    assert bench.held_bytes("released") == bench.held_bytes("online") > bench.held_bytes("cached")
    assert bench.held_bytes("cached") == bench.held_bytes("supervised")


def test_the_benchmark_reports_ratios_to_the_supervised_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.training_step.WAYS", ("supervised", "cached"))
    result = measure(TINY, torch.device("cpu"), 1, {"supervised": 2_000_000, "cached": 3_000_000})
    assert result["time_over_supervised"]["supervised"] == 1
    assert result["step_memory_over_supervised"]["cached"] == 1.5
    assert 1 < result["memory_over_supervised"]["cached"] < 1.5


def test_the_saved_step_from_stored_targets_is_hardly_dearer_than_a_supervised_one() -> None:
    saved = json.loads((RESULTS / "training_step-cpu.json").read_text())
    assert saved["shape"]["image_tokens"] == 728
    assert saved["repeats"] >= 5
    assert saved["time_over_supervised"]["cached"] <= 1.15
    assert saved["memory_over_supervised"]["cached"] <= 1.2
    assert saved["losses"]["cached"] == pytest.approx(saved["losses"]["released"], rel=2e-3)
    assert saved["time_over_supervised"]["released"] > saved["time_over_supervised"]["online"] > 1.15
