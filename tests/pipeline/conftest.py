"""A finished training run, for the tests that only look at one."""

from pathlib import Path

import pytest
import torch

from pipeline.training import train
from stages.student.config import STAGES
from tests.conftest import TinyWorld
from tests.pipeline.runs import run_file


@pytest.fixture(scope="session")
def undisturbed(tiny: TinyWorld, targets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all three stages in one go."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    train(run_file(tiny, targets, output), STAGES)
    return output
