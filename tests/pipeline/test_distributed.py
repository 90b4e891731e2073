"""Training in several processes, however they are started, gives what one process gives."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import TinyWorld
from tests.pipeline.runs import SETTINGS, TrainingData
from tests.pipeline.test_training_data import keys_of
from tests.processes import kill

# A group of processes on a busy machine takes minutes to start.
PATIENCE_S = 500
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE_S)]

ONE = [sys.executable, "-m", "pipeline.cli"]
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "-m",
    "pipeline.cli",
]
# What these processes run on, a GPU or none, they find out themselves.
ACCELERATE = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
]
# Dropout draws on each rank for itself, so it is off where ranks are compared with one process.
# 24 samples in steps of 23: in the last step one process has nothing, and must still take part.
FEW = (*SETTINGS, "train.lora.dropout=0.0", "train.dpt.batch_size=8", "train.sft={batch_size: 23}")


def trained(launcher: list[str], data: TrainingData, targets: Path, output: Path, *settings: str) -> Path:
    done = run_command(launcher, data, targets, output, *settings)
    assert done.returncode == 0, done.stderr[-4000:]
    return output


def run_command(
    launcher: list[str], data: TrainingData, targets: Path, output: Path, *settings: str
) -> "subprocess.CompletedProcess[str]":
    places = ("--samples", data.samples, "--targets", targets, "--student", data.student_lm, "--output", output)
    return train_student(launcher, *places, *(word for setting in (*FEW, *settings) for word in ("--set", setting)))


def train_student(launcher: list[str], *arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [*launcher, "train-student", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        # Processes that wait for each other would go on waiting.
        kill(process)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def broken_launcher(logs: Path, key: str, how: str) -> list[str]:
    """Two processes in which the loss of a sample is broken, see `broken_loss`; `said` reads what they say."""
    module = TORCHRUN.index("-m", 2)
    redirected = ("--log-dir", str(logs), "--redirects", "2")
    return [*TORCHRUN[:module], *redirected, "-m", "tests.pipeline.broken_loss", key, how]


def said(logs: Path) -> dict[str, str]:
    """Standard error of each process, by rank."""
    return {path.parent.name: path.read_text() for path in logs.glob("*/attempt_0/*/stderr.log")}


@pytest.fixture(scope="module")
def alone(tiny: TinyWorld, targets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(ONE, tiny, targets, tmp_path_factory.mktemp("alone") / "run")


def assert_same_training(found: Path, expected: Path) -> None:
    for stage in ("dpt", "dft", "sft"):
        assert_same_stage(found / stage, expected / stage)


def assert_same_stage(found: Path, expected: Path) -> None:
    lines, wanted = (
        [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()] for stage in (found, expected)
    )
    assert len(lines) == len(wanted) > 1
    for one, other in zip(lines, wanted, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        assert one["samples"] == other["samples"]
    student, reference = (load_file(stage / "student" / "model.safetensors") for stage in (found, expected))
    assert student.keys() == reference.keys()
    for name in reference:
        torch.testing.assert_close(student[name], reference[name], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("launcher", "settings", "parallel"),
    [
        (TORCHRUN, [], "ddp"),
        (TORCHRUN, ["train.parallel.strategy=fsdp"], "fsdp"),
        ([*ACCELERATE, "--multi_gpu", "-m", "pipeline.cli"], [], "ddp"),
        ([*ACCELERATE, "--use_fsdp", "--fsdp_version", "2", "-m", "pipeline.cli"], [], "fsdp"),
    ],
    ids=["torchrun-ddp", "torchrun-fsdp", "accelerate-ddp", "accelerate-fsdp"],
)
def test_two_processes_give_the_losses_and_weights_of_one(
    launcher: list[str], settings: list[str], parallel: str, alone: Path, tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    run = trained(launcher, tiny, targets, tmp_path / "run", *settings)
    assert_same_training(run, alone)
    start = json.loads((run / "provenance.jsonl").read_text())
    assert (start["num_processes"], start["parallel"]) == (2, parallel)


def test_two_processes_of_a_ray_cluster_give_the_losses_and_weights_of_one(
    alone: Path, tiny: TinyWorld, targets: Path, ray_address: str, tmp_path: Path
) -> None:
    pytest.importorskip("pandas", reason="the extra ray-train is not installed")
    # Named as seen from here, which is not where Ray's processes run.
    here = os.path.relpath(tiny.samples)
    places = (f"train.dpt.samples={here}", f"train.dpt.targets={os.path.relpath(targets)}")
    on_ray = (f"train.cluster.ray_address={ray_address}", "train.cluster.workers=2")
    run = trained(ONE, tiny, targets, tmp_path / "run", *on_ray, *places)
    assert_same_training(run, alone)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_a_mistake_that_one_process_of_a_ray_cluster_meets_ends_all_at_once_and_is_said(
    tiny: TinyWorld, ray_address: str, tmp_path: Path
) -> None:
    pytest.importorskip("pandas", reason="the extra ray-train is not installed")
    from pipeline.cluster import ray_train_group
    from storage.errors import UserError

    def work(_send: object, _asked: object) -> None:
        import torch.distributed

        if torch.distributed.get_rank() == 1:
            raise UserError("only I cannot go on")
        torch.distributed.barrier()

    begun = time.monotonic()
    with pytest.raises(UserError, match="only I cannot go on"):
        ray_train_group.run_group(
            work,
            num_workers=2,
            gpus_per_worker=0,
            max_attempts=3,
            storage=str(tmp_path),
            on_message=print,
            should_stop=lambda: False,
        )
    assert time.monotonic() - begun < 240


@pytest.mark.parametrize("how", ["loss", "both"])
def test_a_loss_that_is_not_finite_in_one_process_ends_both_with_the_samples_named(
    how: str, tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    key = keys_of(tiny.samples)[7]
    launcher = broken_launcher(tmp_path / "logs", key, how)
    # One sample a process: it is in one of them.
    alone = ("train.loader.microbatch_size=1", "train.dpt={batch_size: 2, epochs: 1}")
    done = run_command(launcher, tiny, targets, tmp_path / "run", *alone)
    assert done.returncode != 0
    found = said(tmp_path / "logs")
    assert found.keys() == {"0", "1"}
    for text in found.values():
        assert re.search(rf"the loss is nan at step \d+; the batch holds samples .*\b{key}\b", text)
        assert "Traceback" not in text
    assert not (tmp_path / "run/dpt/student").exists()
