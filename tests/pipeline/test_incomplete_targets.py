"""Training on a store whose extraction did not finish: only when asked to, and never on with other shards."""

import shutil
from pathlib import Path

import pytest
import torch

from pipeline.attention_comparison import compare_with_targets
from pipeline.run_file import RunFile
from pipeline.training import train
from storage.errors import FingerprintMismatch, UserError
from tests.conftest import NUM_SAMPLES, SAMPLES_PER_SHARD, TinyWorld
from tests.pipeline.processes import tree
from tests.pipeline.runs import run_file

LAST = NUM_SAMPLES // SAMPLES_PER_SHARD - 1
EPOCH = "train.dpt={batch_size: 4, epochs: 1}"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def incomplete(targets: Path, tmp_path: Path) -> Path:
    """A copy of the targets without the last shard."""
    store = shutil.copytree(targets, tmp_path / "incomplete")
    (store / f"commits/{LAST:06d}.json").unlink()
    return store


def allowed(tiny: TinyWorld, store: Path, output: Path) -> RunFile:
    return run_file(tiny, store, output, EPOCH, "train.data.allow_incomplete=true")


def test_an_incomplete_store_is_trained_on_and_compared_with_when_that_is_allowed(
    tiny: TinyWorld, incomplete: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"to finish it, or train on these with train\.data\.allow_incomplete"):
        train(run_file(tiny, incomplete, tmp_path / "refused", EPOCH), ["dpt"])
    output = tmp_path / "run"
    (report,) = train(allowed(tiny, incomplete, output), ["dpt"])
    assert report.samples == NUM_SAMPLES - SAMPLES_PER_SHARD
    assert compare_with_targets(str(output), str(tiny.samples), str(incomplete), 4).num_samples > 0


def test_a_run_begun_on_fewer_shards_does_not_go_on_with_more_or_with_others(
    tiny: TinyWorld, targets: Path, incomplete: Path, tmp_path: Path
) -> None:
    run = allowed(tiny, incomplete, tmp_path / "run")
    train(run, ["dpt"])
    before = tree(tmp_path / "run")
    record = f"commits/{LAST:06d}.json"
    shutil.copy(targets / record, incomplete / record)
    with pytest.raises(FingerprintMismatch, match=r"targets were incomplete, .*num_samples.*train into a new folder"):
        train(run, ["dpt"])
    # As many samples as before, but not the same ones.
    (incomplete / "commits/000000.json").unlink()
    with pytest.raises(FingerprintMismatch, match=r"differs in: shards\)"):
        train(run, ["dpt"])
    assert tree(tmp_path / "run") == before


def test_a_run_on_a_whole_store_goes_on_whether_or_not_parts_would_do(
    tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    (first,) = train(allowed(tiny, targets, tmp_path / "run"), ["dpt"])
    (again,) = train(run_file(tiny, targets, tmp_path / "run", EPOCH), ["dpt"])
    assert again == first
