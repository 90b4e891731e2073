"""Files beside a stage's metrics: none is lost to a kill, none is used half-written."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from stages.student.training.metrics import metrics_log
from tests.stages.distilled import extract_here, make_tiny_data
from tests.stages.student.validated_run import HELD_OUT, train_validated

FAKE = """
ids = []

class Run:
    def finish(self):
        pass

def init(**settings):
    ids.append(settings["id"])
    return Run()
"""
"""In the place of Weights & Biases."""


def test_the_losses_so_far_are_replaced_in_one_step_when_a_stage_goes_on(tmp_path: Path) -> None:
    with metrics_log(tmp_path, (), 0, {}, enabled=True) as write:
        for step in (1, 2, 3):
            write(step, {"loss": 1.0 / step})
    # The file as whoever opened it has it: not cut while the new one is written.
    os.link(tmp_path / "metrics.jsonl", tmp_path / "before")
    before = (tmp_path / "before").read_bytes()
    with metrics_log(tmp_path, (), 2, {}, enabled=True) as write:
        write(3, {"loss": 0.5})
    assert (tmp_path / "before").read_bytes() == before
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [1.0, 0.5, 0.5]


@pytest.mark.parametrize("left", ["", "\n", "0123abcd"], ids=["empty", "blank", "whole"])
def test_a_run_of_weights_and_biases_goes_on_under_its_id_and_never_under_an_empty_one(
    left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "wandb.py").write_text(FAKE)
    monkeypatch.syspath_prepend(package)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    folder = tmp_path / "dpt"
    folder.mkdir()
    (folder / "wandb-id.txt").write_text(left)
    for _ in range(2):
        with metrics_log(folder, ("wandb",), 0, {}, enabled=True):
            pass
    first, second = sys.modules["wandb"].ids
    assert first == second == (folder / "wandb-id.txt").read_text()
    assert len(first) == 8
    assert left.strip() in ("", first)
    monkeypatch.delitem(sys.modules, "wandb")


def test_tensorboards_file_has_the_curves_of_training_and_of_held_out_samples(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    torch.set_num_threads(1)
    extract_here(make_tiny_data(tmp_path), tmp_path / "targets", num_matched=2)
    trackers = {"logging": {"every": 1, "trackers": ["tensorboard"]}}
    train_validated(tmp_path, "run", {"validation": {"keys": list(HELD_OUT), "every": 2}, **trackers})
    events = accumulator.EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    terms = ["loss", "lm", "kd", "attention"]
    of_training, of_validation = terms, [f"validation/{term}" for term in (*terms, "seconds")]
    for names, steps in ((of_training, [1, 2, 3, 4, 5, 6]), (of_validation, [2, 4, 6])):
        for name in names:
            curve = events.Scalars(name)
            assert [event.step for event in curve] == steps
            written = {line["step"]: line[name] for line in lines if name in line}
            assert [event.value for event in curve] == pytest.approx([written[step] for step in steps], rel=1e-6)
