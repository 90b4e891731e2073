"""A finished training run, for the tests that only look at one; extraction without Ray, where Ray is not the point."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.training import train
from stages.student.stage_config import STAGES
from tests.conftest import TinyWorld
from tests.pipeline.in_process import without_ray
from tests.pipeline.runs import run_file


@pytest.fixture(scope="session")
def undisturbed(tiny: TinyWorld, targets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all three stages in one go."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    train(run_file(tiny, targets, output), STAGES)
    return output


@pytest.fixture
def shards_made_here() -> Iterator[None]:
    """For the time of the test an extraction makes its shards in this process."""
    with without_ray():
        yield
