"""Commands that look at a finished run: how it is scored, which layers are compared, on what, and where."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.attention_comparison import compare_with_targets
from pipeline.training import train
from tests.conftest import NUM_SAMPLES, TinyWorld
from tests.pipeline.runs import run_file
from tests.recorded_progress import RecordedProgress


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_attention_is_compared_at_the_layers_that_the_run_matched_else_at_the_default_ones(
    tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    run = run_file(tiny, targets, tmp_path / "run", "train.matching.student_layers=[0, 1, 3]", "train.dft.max_steps=1")
    train(run, ["dft"])
    (tmp_path / "run/dft/student").rename(tmp_path / "alone")
    (tmp_path / "run/dft/student").symlink_to(tmp_path / "alone")
    places = str(tiny.samples), str(targets)
    trained = compare_with_targets(str(tmp_path / "run"), *places, 4)
    default = compare_with_targets(str(tmp_path / "alone"), *places, 4)
    assert (trained.student_layers, trained.layers_from) == ((0, 1, 3), "training")
    assert default.layers_from == "default"
    assert default.student_layers != trained.student_layers


@pytest.mark.parametrize("limit", [3, 18, NUM_SAMPLES + 5])
def test_as_many_samples_are_compared_as_were_asked_for(
    limit: int, undisturbed: Path, tiny: TinyWorld, targets: Path
) -> None:
    progress = RecordedProgress()
    compare_with_targets(str(undisturbed), str(tiny.samples), str(targets), limit, progress)
    assert progress.tasks[0].done == min(limit, NUM_SAMPLES)


def test_the_comparison_runs_where_models_are_put(
    undisturbed: Path, tiny: TinyWorld, targets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[str] = []

    def note(student: Any, *_: Any, **__: Any) -> None:
        devices.append(student.device.type)

    # Stands for a GPU, which tests do not have.
    monkeypatch.setattr("pipeline.attention_comparison.default_device", lambda: torch.device("meta"))
    monkeypatch.setattr("pipeline.attention_comparison.attention_similarity", note)
    compare_with_targets(str(undisturbed), str(tiny.samples), str(targets), 1)
    assert devices == ["meta"]
