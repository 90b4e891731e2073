"""Losses are means over the global batch, however it is cut into microbatches and dealt out to ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import make_foreign_lm
from tests.stages.distilled import extract_here, make_tiny_data
from tests.stages.student.one_step import BATCH_SIZE, step_folder, take_step

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


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """A step of one sample."""
    return take_step(folder, 4, num_samples=1)


def metrics(output: Path) -> dict[str, float]:
    (line,) = (output / "metrics.jsonl").read_text().splitlines()
    return {name: value for name, value in json.loads(line).items() if name in TERMS}


def counts(output: Path, num_ranks: int) -> list[tuple[int, int]]:
    return [tuple(c) for rank in range(num_ranks) for c in json.loads((output / f"rank-{rank}.json").read_text())]


def assert_uneven(microbatches: list[tuple[int, int]]) -> None:
    """Or the mean of the microbatches' means would do as well."""
    rows, images = (set(numbers) for numbers in zip(*microbatches, strict=True))
    assert len(rows) > 1
    assert len(images) > 1


def assert_same_step(found: Path, expected: Path) -> None:
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
    microbatches = counts(found, 1)
    assert len(microbatches) == num_microbatches
    assert_uneven(microbatches)
    assert sum(rows for rows, _ in microbatches) == counts(whole, 1)[0][0]
    assert_same_step(found, whole)


def on_two_ranks(folder: Path, microbatch_size: int, parallel: str, num_samples: int = BATCH_SIZE) -> Path:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [str(folder), str(microbatch_size), parallel, str(num_samples)]
    command = [*launcher, "-m", "tests.stages.student.one_step", *arguments]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return step_folder(folder, 2, microbatch_size, parallel, num_samples)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("num_microbatches", [1, 2, 4])
def test_two_ranks_give_the_gradients_and_loss_terms_of_one(
    num_microbatches: int, parallel: str, folder: Path, whole: Path
) -> None:
    found = on_two_ranks(folder, BATCH_SIZE // (2 * num_microbatches), parallel)
    microbatches = counts(found, 2)
    assert len(microbatches) == 2 * num_microbatches
    assert_uneven(microbatches)
    assert_same_step(found, whole)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_rank_without_a_sample_changes_nothing(parallel: str, folder: Path, alone: Path) -> None:
    found = on_two_ranks(folder, 4, parallel, num_samples=1)
    assert sorted(counts(found, 2)) == [(0, 0), *counts(alone, 1)]
    assert_same_step(found, alone)


def test_gradients_that_were_kept_are_those_of_the_decoder_head_and_post_connector(whole: Path) -> None:
    gradients = load_file(whole / "gradients.safetensors")
    assert len(gradients) > 60
    assert all(bool(torch.isfinite(g).all()) and float(g.norm()) > 0 for g in gradients.values())


@pytest.fixture(scope="module", params=["uld", "shared"])
def across(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same samples for a student with another tokenizer, of whose answer rows some are compared."""
    made = tmp_path_factory.mktemp(request.param)
    make_foreign_lm(made / "lm")
    (made / "stage.json").write_text(json.dumps({"kd_alignment": request.param}))
    for name in ("samples", "targets"):
        (made / name).symlink_to(folder / name)
    return made


def test_logits_across_tokenizers_are_a_mean_over_compared_rows_in_any_number_of_microbatches(across: Path) -> None:
    found, whole = take_step(across, 4), take_step(across, BATCH_SIZE)
    assert metrics(whole)["kd"] > 0
    assert_uneven(counts(found, 1))
    assert_same_step(found, whole)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_logits_across_tokenizers_are_a_mean_over_compared_rows_of_all_ranks(parallel: str, across: Path) -> None:
    assert_same_step(on_two_ranks(across, 4, parallel), take_step(across, BATCH_SIZE, num_samples=BATCH_SIZE))
