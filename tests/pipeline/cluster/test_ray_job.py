"""The job of `docs/cluster.md`, as it stands there, on a cluster of this machine."""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from storage.integrity.verify import verify
from tests.conftest import TinyWorld
from tests.pipeline.cluster.ray_nodes import nodes
from tests.pipeline.processes import tree
from tests.processes import PATIENCE_S

pytest.importorskip("aiohttp_cors", reason="the cluster's dashboard takes jobs: pip install compodistill[cluster]")

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_the_documented_job_extracts_a_store_from_the_uploaded_checkout(
    tiny: TinyWorld, targets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where the job finds `python`, and `ray` is.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    store, port = tmp_path / "store", _free_port()
    with nodes("one", dashboard_port=port):
        command = _documented_command(
            {
                "http://HEAD:8265": f"http://127.0.0.1:{port}",
                "CHECKPOINT": tiny.teacher,
                "s3://bucket/samples": tiny.samples,
                "s3://bucket/targets": store,
            }
        )
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout + done.stderr
    assert verify(store, tiny.samples).ok
    lasting = ("teacher/", "shards/", "commits/")
    assert tree(store, *lasting) == tree(targets, *lasting)


def _documented_command(places: dict[str, object]) -> list[str]:
    (block,) = re.findall(r"```bash\n(ray job submit .*?)```", (ROOT / "docs/cluster.md").read_text(), re.DOTALL)
    command = shlex.split(block.replace("\\\n", " "))
    assert places.keys() <= set(command)
    return [str(places.get(word, word)) for word in command]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
