"""Commands in a process of their own, whose standard error is no terminal, as in the log of a job."""

import re
from pathlib import Path

import pytest

from pipeline.ui.progress import LOG_EVERY_VARIABLE
from tests.conftest import NUM_SAMPLES, TinyWorld
from tests.pipeline.processes import cdp


def test_packing_says_how_far_it_is_line_by_line(
    tiny: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LOG_EVERY_VARIABLE, "0")
    lines = cdp("pack-samples", tiny.data, tiny.images, tmp_path / "samples").err.splitlines()
    assert len(lines) > 3
    assert all(line.startswith("pack: ") and line.isprintable() for line in lines)
    assert f"{NUM_SAMPLES} of {NUM_SAMPLES} samples" in lines[-1]
    assert ", took 0:00:" in lines[-1]


def test_a_short_check_is_one_line(tiny: TinyWorld, targets: Path) -> None:
    done = cdp("verify", targets, "--samples", tiny.samples)
    (line,) = done.err.splitlines()
    assert re.match(r"verify: (\d+) of \1 shards, .*took 0:00:", line)
    assert "verify:" not in done.out
