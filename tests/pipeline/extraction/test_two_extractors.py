"""Two real extractions at once on one store, as from two machines: each shard once, no mixture, nothing left over."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from storage.integrity.verify import verify
from storage.stores import open_store
from tests.conftest import TinyWorld
from tests.processes import PATIENCE_S

pytestmark = pytest.mark.slow


def _start(tiny: TinyWorld, targets: str, samples: str, cache: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "pipeline.cli", "extract-teacher", "--teacher", str(tiny.teacher)]
    command += ["--samples", samples, "--targets", targets, "--workers", "1", "--set", "teacher.batch_size=4"]
    environment = {**os.environ, "CDP_CACHE_DIR": str(cache)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _lasting(url: str) -> dict[str, bytes]:
    store = open_store(url)
    return {path: store.read(path) for path in store.list() if not path.startswith("reports/")}


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_two_extractions_at_once_give_the_store_of_one(
    where: str, tiny: TinyWorld, targets: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    samples, url = str(tiny.samples), str(tmp_path / "store")
    if where == "s3":
        bucket = f"{request.getfixturevalue('s3_bucket')}/{tmp_path.name}"
        samples, url = f"{bucket}/samples", f"{bucket}/targets"
        for file in sorted(tiny.samples.iterdir()):
            open_store(samples).write(file.name, file.read_bytes())
    both = [_start(tiny, url, samples, tmp_path / f"cache{number}") for number in range(2)]
    for extraction in both:
        _, said = extraction.communicate(timeout=PATIENCE_S)
        assert extraction.returncode == 0, said
    assert _lasting(url) == _lasting(str(targets))
    assert verify(url, samples).ok
    last = _start(tiny, url, samples, tmp_path / "cache0")
    _, said = last.communicate(timeout=PATIENCE_S)
    assert last.returncode == 0, said
    assert list(tmp_path.rglob("*.partial")) == []
    assert _lasting(url) == _lasting(str(targets))
