"""The wheel that `pip install compodistill` unpacks, tried in a folder that holds packages of the same names."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("pipeline", "stages", "storage")

NEEDS_LMMS_EVAL = "pipeline/lmms_eval/models.py"
"""Only lmms-eval imports it."""

IMPORT_ALL = """
import importlib, sys
from pathlib import Path
top = Path(sys.argv[1])
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    assert Path(module.__file__).is_relative_to(top), module.__file__
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("compodistill-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    return folder


@pytest.fixture
def users_folder(tmp_path: Path) -> Path:
    """A working directory with packages of the user's own, which must not be imported in place of ours."""
    for name in PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('a package of the user')")
    return tmp_path


def files_of_packages() -> set[str]:
    paths = (path for package in PACKAGES for path in (ROOT / package).rglob("*"))
    return {path.relative_to(ROOT).as_posix() for path in paths if path.is_file() and "__pycache__" not in path.parts}


def test_the_wheel_holds_every_file_of_the_three_packages_and_no_other_top_level(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert set(names) == files_of_packages()
    assert {"storage/FORMAT.md", "pipeline/configs/demo.yaml", "pipeline/demo/teacher/config.json"} < set(names)


@pytest.mark.parametrize("arguments", [("--help",), ("demo", "--help"), ("--version",)])
def test_the_installed_command_runs_beside_packages_of_the_same_names(
    arguments: tuple[str, ...], installed: Path, users_folder: Path
) -> None:
    done = subprocess.run(
        [installed / "bin" / "cdp", *arguments],
        cwd=users_folder,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "cdp" in done.stdout


@pytest.mark.slow
def test_every_installed_module_is_imported_from_there(installed: Path, users_folder: Path) -> None:
    modules = [
        name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        for name in sorted(files_of_packages())
        if name.endswith(".py") and not name.endswith("__main__.py") and name != NEEDS_LMMS_EVAL
    ]
    done = subprocess.run(
        [sys.executable, "-P", "-c", IMPORT_ALL, str(installed), *modules],
        cwd=users_folder,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
