"""Losses are means over the global batch, however it is cut into microbatches and dealt out to ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.stages.distilled import extract_here, make_tiny_data
from tests.stages.student.one_step import BATCH_SIZE, take_step

TERMS = ("loss", "lm", "kd", "attention", "grad_norm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of which a fifth are text alone and two fifths have several turns; one step takes 16 of 20."""
    folder = tmp_path_factory.mktemp("normalisation")
    extract_here(make_tiny_data(folder), folder / "targets", num_matched=2)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """The step with all samples in one forward pass, in one process."""
    return take_step(folder, BATCH_SIZE)


def metrics(output: Path) -> dict[str, float]:
    (line,) = (output / "metrics.jsonl").read_text().splitlines()
    return {name: value for name, value in json.loads(line).items() if name in TERMS}


def counts(output: Path, num_ranks: int) -> list[tuple[int, int]]:
    return [tuple(c) for rank in range(num_ranks) for c in json.loads((output / f"rank-{rank}.json").read_text())]


def assert_same_step(found: Path, expected: Path, num_ranks: int, num_microbatches: int) -> None:
    microbatches = counts(found, num_ranks)
    assert len(microbatches) == num_microbatches
    # Or the mean of the microbatches' means would do as well.
    rows, images = (set(numbers) for numbers in zip(*microbatches, strict=True))
    assert len(rows) > 1
    assert len(images) > 1
    assert sum(r for r, _ in microbatches) == counts(expected, 1)[0][0]
    assert metrics(found) == pytest.approx(metrics(expected), rel=1e-5)
    gradients, wanted = (load_file(output / "gradients.safetensors") for output in (found, expected))
    assert gradients.keys() == wanted.keys()
    largest = max(float(g.norm()) for g in wanted.values())
    for name, gradient in gradients.items():
        assert float((gradient - wanted[name]).norm()) < 1e-5 * float(wanted[name].norm()) + 1e-7 * largest, name


@pytest.mark.parametrize("num_microbatches", [2, 4])
def test_accumulated_microbatches_give_the_gradients_and_loss_terms_of_one(
    num_microbatches: int, folder: Path, whole: Path
) -> None:
    assert set(metrics(whole)) == set(TERMS)
    found = take_step(folder, BATCH_SIZE // num_microbatches)
    assert_same_step(found, whole, num_ranks=1, num_microbatches=num_microbatches)


@pytest.mark.slow
@pytest.mark.parametrize(("microbatch_size", "parallel"), [(8, "ddp"), (4, "ddp"), (4, "fsdp")])
def test_two_ranks_give_the_gradients_and_loss_terms_of_one(
    microbatch_size: int, parallel: str, folder: Path, whole: Path
) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "tests.stages.student.one_step", str(folder), str(microbatch_size), parallel]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    found = folder / f"step-{parallel}-2x{microbatch_size}"
    assert_same_step(found, whole, num_ranks=2, num_microbatches=BATCH_SIZE // microbatch_size)


def test_gradients_that_were_kept_are_those_of_the_decoder_head_and_post_connector(whole: Path) -> None:
    gradients = load_file(whole / "gradients.safetensors")
    assert len(gradients) > 60
    assert all(bool(torch.isfinite(g).all()) and float(g.norm()) > 0 for g in gradients.values())
