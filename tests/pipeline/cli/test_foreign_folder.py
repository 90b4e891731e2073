"""Code in the folder in which a command is typed runs in no process of the command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.student.data.loader import _FlatBatches
from storage import safe_path
from storage.errors import UserError
from storage.safe_path import check_code, code_digest
from tests.conftest import TinyWorld
from tests.pipeline.runs import SETTINGS
from tests.processes import PATIENCE_S

SHADOWED = ("pipeline", "stages", "storage", "torch", "random", "zarr", "numpy", "multiprocessing", "typer", "ray")


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder with modules of these names, each of which leaves a file when it is imported."""
    folder = tmp_path / "foreign"
    for name in SHADOWED:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(
            f"open({str(tmp_path)!r} + '/ran-{name}', 'w')\nraise SystemExit(9)\n"
        )
    return folder


def run_there(folder: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """The installed command, typed in `folder`."""
    command = [Path(sys.executable).with_name("cdp"), *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    return subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def ran(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.parent.glob("ran-*"))


@pytest.mark.slow
def test_training_with_loader_processes_imports_nothing_of_it(tiny: TinyWorld, targets: Path, foreign: Path) -> None:
    flags = {"samples": tiny.samples, "targets": targets, "student": tiny.student_lm, "output": foreign / "run"}
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    settings = [word for setting in (*SETTINGS, "train.loader.num_workers=1") for word in ("--set", setting)]
    done = run_there(foreign, "train-student", "--stage", "dpt", *words, *settings)
    assert done.returncode == 0, done.stderr
    assert ran(foreign) == []


@pytest.mark.slow
def test_extraction_on_a_cluster_of_its_own_imports_nothing_of_it(tiny: TinyWorld, foreign: Path) -> None:
    done = run_there(
        foreign,
        "extract-teacher",
        "--teacher",
        tiny.teacher,
        "--samples",
        tiny.samples,
        "--targets",
        foreign / "targets",
    )
    assert done.returncode == 0, done.stderr
    assert ran(foreign) == []


def test_a_process_that_would_import_from_its_folder_says_so_before_it_works(
    foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(foreign)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    with pytest.raises(UserError, match=f"imports Python code from {foreign}"):
        safe_path.check_safe_path()
    monkeypatch.setattr("stages.student.data.loader.get_worker_info", lambda: "a loader process")
    (answer,) = _FlatBatches([], lambda _: None)  # type: ignore[arg-type]
    assert isinstance(answer, UserError)


def test_a_worker_with_other_code_than_the_command_says_which() -> None:
    check_code(code_digest())
    with pytest.raises(UserError, match=r"imports `stages` from .* the command's own has 0123"):
        check_code("0123")


def test_code_that_is_there_no_longer_is_an_error_and_no_digest_of_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safe_path, "ROOT", tmp_path)
    with pytest.raises(UserError, match=f"found no source files in {tmp_path}/pipeline"):
        code_digest.__wrapped__()
