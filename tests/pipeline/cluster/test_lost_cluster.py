"""Where Ray's own processes are killed, a command says so and ends."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.integrity.verify import verify
from tests.checkpoints import make_llava_data
from tests.conftest import TinyWorld
from tests.pipeline.processes import cdp, start_cdp
from tests.pipeline.runs import SETTINGS
from tests.processes import PATIENCE_S, descendants, kill, runs_until

FOUND = {
    "raylet": "the raylet of this machine died",
    "gcs_server": "has not answered for 30 s",
}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE_S)]


def kill_one_of_ray(process: "subprocess.Popen[bytes]", name: str) -> None:
    programs = {Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]: pid for pid in descendants(process.pid)}
    (pid,) = (pid for program, pid in programs.items() if program.endswith(f"/{name}".encode()))
    os.kill(pid, signal.SIGKILL)


def actors(process: "subprocess.Popen[bytes]") -> list[int]:
    """Workers of an extraction; there are none in training."""
    names = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in descendants(process.pid)}
    return [pid for pid, name in names.items() if name.startswith(b"ray::_Actor")]


def ended_without(name: str, arguments: list[object], begun: Callable[[], bool], scratch: Path) -> str:
    """What the command says when it lost that process of its cluster."""
    process = start_cdp(*arguments, err=scratch / "err")
    try:
        assert runs_until(process, begun)
        # Else a fast machine ends the work before the loss is noticed.
        for worker in actors(process):
            os.kill(worker, signal.SIGSTOP)
        kill_one_of_ray(process, name)
        assert process.wait(PATIENCE_S) == 2
    finally:
        kill(process)
    said = (scratch / "err").read_text().splitlines()[-1]
    assert said.startswith("error: the Ray cluster is lost: ")
    return said


@pytest.fixture(scope="module")
def many(tiny: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of some seconds of work."""
    folder = tmp_path_factory.mktemp("many")
    data, images = make_llava_data(folder, 1200)
    assert cdp("pack-samples", data, images, folder / "samples", "--samples-per-shard", 20).code == 0
    return folder / "samples"


@pytest.mark.parametrize("name", FOUND)
def test_an_extraction_says_that_its_cluster_is_lost_and_what_is_stored_is_whole(
    name: str, tiny: TinyWorld, many: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    command = ["extract-teacher", "--teacher", tiny.teacher, "--samples", many, "--targets", store]
    assert FOUND[name] in ended_without(name, command, lambda: any(store.glob("shards/*")), tmp_path)
    assert verify(store, many).findings == ()


def test_training_on_ray_says_so_too(tiny: TinyWorld, targets: Path, tmp_path: Path) -> None:
    pytest.importorskip("pandas", reason="the extra ray-train is not installed")
    places = {"samples": tiny.samples, "targets": targets, "student": tiny.student_lm, "output": tmp_path / "run"}
    words = [word for name, place in places.items() for word in (f"--{name}", place)]
    long = ("train.cluster.workers=1", "train.dpt={batch_size: 4, epochs: 100000}", "train.checkpoint.every=10")
    settings = [word for setting in (*SETTINGS, *long) for word in ("--set", setting)]
    command = ["train-student", "--ray-address", "local", "--stage", "dpt", *words, *settings]
    metrics = tmp_path / "run" / "dpt" / "metrics.jsonl"
    for name, found in FOUND.items():
        before = len(metrics.read_text()) if metrics.exists() else 0
        said = ended_without(name, command, lambda: metrics.exists() and len(metrics.read_text()) > before, tmp_path)  # noqa: B023
        assert found in said
