"""What is captured where the library splits heads over processes: each has the mean of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import make_tiny_llava
from tests.processes import PATIENCE_S

SCRIPT = ["-m", "tests.stages.attention.tensor_parallel"]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.slow
def test_maps_of_two_processes_averaged_are_those_of_one_that_has_all_heads(tmp_path: Path) -> None:
    teacher = make_tiny_llava(tmp_path / "teacher")
    for launcher in ([], TWO):
        done = subprocess.run(
            [sys.executable, *launcher, *SCRIPT, str(teacher), str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"},
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "0", "1"))
    torch.testing.assert_close(first.pop("logits"), one["logits"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(second.pop("logits"), one.pop("logits"), atol=1e-5, rtol=1e-5)
    assert len(one) == 4
    for name, expected in one.items():
        torch.testing.assert_close((first[name] + second[name]) / 2, expected, atol=1e-6, rtol=1e-5)
        assert (first[name] - second[name]).abs().max() > 1e-3, "each has other heads"
