"""Training in several processes gives what one process gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import TinyWorld
from tests.pipeline.runs import SETTINGS


@pytest.mark.slow
def test_two_processes_under_torchrun_give_the_losses_and_weights_of_one(
    tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    settings = [
        part
        for setting in (*SETTINGS, "train.lora.dropout=0.0", "train.dpt.batch_size=8")
        for part in ("--set", setting)
    ]
    places = ["--samples", str(tiny.samples), "--targets", str(targets), "--student", str(tiny.student_lm)]
    launchers = {
        "one": [sys.executable, "-m", "pipeline.cli"],
        "two": [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "pipeline.cli",
        ],
    }
    for name, launcher in launchers.items():
        command = [*launcher, "train-student", *places, "--output", str(tmp_path / name), *settings]
        done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr

    for stage in ("dpt", "dft", "sft"):
        metrics = {
            name: [json.loads(line) for line in (tmp_path / name / stage / "metrics.jsonl").read_text().splitlines()]
            for name in launchers
        }
        assert len(metrics["one"]) == len(metrics["two"]) > 1
        for one, two in zip(metrics["one"], metrics["two"], strict=True):
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
            assert two["samples"] == one["samples"]
        one, two = (load_file(tmp_path / name / stage / "student" / "model.safetensors") for name in launchers)
        for weight in one:
            torch.testing.assert_close(two[weight], one[weight], rtol=1e-3, atol=2e-4)
