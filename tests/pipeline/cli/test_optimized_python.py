"""Python without assertions does the same; Python without docstrings is refused, as transformers reads them."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import TinyWorld
from tests.pipeline.processes import cdp, tree
from tests.pipeline.runs import SETTINGS

WEIGHTS = "sft/student/model.safetensors"


def test_python_without_docstrings_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONOPTIMIZE", "2")
    ended = cdp("inspect", "targets")
    assert (ended.code, ended.err) == (
        2,
        "error: transformers reads docstrings, which python -OO removes; set PYTHONOPTIMIZE to 1 or 0\n",
    )


@pytest.mark.slow
def test_without_assertions_training_gives_the_same_weights(
    tiny: TinyWorld, targets: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")
    places = {"samples": tiny.samples, "targets": targets, "student": tiny.student_lm, "output": tmp_path / "run"}
    words = [word for name, place in places.items() for word in (f"--{name}", place)]
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    ended = cdp("train-student", "--stage", "all", *words, *settings)
    assert ended.code == 0, ended.err
    assert tree(tmp_path / "run", WEIGHTS) == tree(undisturbed, WEIGHTS) != {}


@pytest.mark.slow
def test_without_assertions_verify_finds_the_same_damage(
    targets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = shutil.copytree(targets, tmp_path / "store")
    chunk = max((file for file in store.rglob("c/*") if file.is_file()), key=lambda file: file.stat().st_size)
    chunk.write_bytes(chunk.read_bytes()[:-1])
    found = cdp("verify", store)
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")
    assert found.code == 1
    assert (found.out, found.code) == ((again := cdp("verify", store)).out, again.code)
