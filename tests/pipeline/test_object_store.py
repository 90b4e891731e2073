"""Extraction and training with samples and targets on an S3 server, as on a cluster."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from storage.integrity.verify import verify
from storage.stores import open_store
from tests.conftest import TinyWorld
from tests.pipeline.runs import SETTINGS


def cdp(*arguments: str, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_targets_on_s3_have_the_bytes_and_give_the_student_of_a_local_store(
    tiny: TinyWorld, targets: Path, undisturbed: Path, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CDP_CACHE_DIR", str(tmp_path / "cache"))
    # Less than any file: what no process holds is evicted at once, by each of them.
    monkeypatch.setenv("CDP_CACHE_GB", "1e-6")
    samples_url, targets_url = f"{s3_bucket}/{tmp_path.name}/samples", f"{s3_bucket}/{tmp_path.name}/targets"
    samples = open_store(samples_url)
    for file in sorted(tiny.samples.iterdir()):
        samples.write(file.name, file.read_bytes())
    places = ("--samples", samples_url, "--targets", targets_url)
    environment = dict(os.environ)
    extract = ("extract-teacher", "--teacher", str(tiny.teacher), *places, "--workers", "1")
    cdp(*extract, "--set", "teacher.batch_size=4", environment=environment)

    here, there = open_store(targets), open_store(targets_url)
    stored = [path for path in here.list() if not path.startswith("reports/")]
    assert [path for path in there.list() if not path.startswith("reports/")] == stored
    assert all(here.read(path) == there.read(path) for path in stored)
    assert verify(targets_url, samples_url).ok

    settings = [part for setting in (*SETTINGS, "train.loader.num_workers=2") for part in ("--set", setting)]
    output = tmp_path / "run"
    train = ("train-student", *places, "--student", str(tiny.student_lm), "--output", str(output), *settings)
    cdp(*train, environment=environment)
    found, expected = (load_file(run / "sft" / "student" / "model.safetensors") for run in (output, undisturbed))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
