import subprocess
import sys
from pathlib import Path

import pytest

from tests.import_arrows import (
    ONE_PLACE,
    arrow_violations,
    imported_modules,
    package_circles,
    python_files,
    unsafe_calls,
)

ROOT = Path(__file__).parent.parent

PURE_MODULES = [
    "stages.attention.capture",
    "stages.student.losses",
    "stages.student.training.objective",
    "stages.student.model.modeling_any_teacher",
    "stages.student.model.modeling_compodistill",
    # Measured on bare GPU machines.
    "benchmarks.capture",
    "benchmarks.training_step",
] + [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in python_files(ROOT, "storage/codecs")
]


def run_python(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_the_imports_of_every_file_follow_the_arrows() -> None:
    assert arrow_violations(ROOT) == []


@pytest.mark.parametrize("library", ONE_PLACE)
def test_a_library_that_belongs_to_one_place_is_imported_there(library: str) -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for path in python_files(ROOT, "pipeline", "stages", "storage")
        if any(name.split(".")[0] == library for _, name in imported_modules(path, ROOT))
    }
    assert users
    assert all(user.startswith(ONE_PLACE[library]) for user in users)


def test_no_two_packages_import_each_other_in_a_circle() -> None:
    assert package_circles(ROOT) == []


def test_a_circle_of_packages_is_found(tmp_path: Path) -> None:
    files = {
        "stages/a/x.py": "from stages.b import y",
        "stages/b/y.py": "from stages.c.z import thing",
        "stages/c/z.py": "def f():\n    import stages.a.x",
        "stages/d/w.py": "import stages.a.x",
    }
    write_tree(tmp_path, files)
    assert package_circles(tmp_path) == [["stages.a", "stages.b", "stages.c"]]


def test_nothing_unpickles_or_runs_code_from_a_checkpoint() -> None:
    assert unsafe_calls(ROOT, "pipeline", "stages", "storage", "examples", "benchmarks") == []


BAD_IMPORTS = {
    "storage looks up": ("storage/a.py", "import stages.images", "storage may not import stages"),
    "stages look up": ("stages/a.py", "from pipeline import cli", "stages may not import pipeline"),
    "inside a function": ("stages/a.py", "def f():\n    from pipeline.cli.app import app", "pipeline"),
    "for types only": (
        "stages/a.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pipeline.cli.app",
        "stages may not import pipeline",
    ),
    "by a string": ("stages/a.py", "import importlib\nimportlib.import_module('pipeline.cli.app')", "pipeline"),
    "relative and upwards": (
        "stages/student/a.py",
        "from ..teacher import teacher",
        "may not know each other",
    ),
    "the teacher in the student": ("stages/student/a.py", "from stages import teacher", "may not know"),
    "the student in the teacher": ("stages/teacher/a.py", "import stages.student.losses", "may not know"),
    "product code on tests": ("pipeline/a.py", "import tests.import_arrows", "may not import tests"),
    "ray in stages": ("stages/a.py", "import ray", "ray belongs to pipeline"),
    "typer in storage": ("storage/a.py", "from typer import Typer", "typer belongs to pipeline"),
    "zarr in stages": ("stages/a.py", "import zarr.codecs", "zarr belongs to storage"),
    "webdataset in pipeline": ("pipeline/a.py", "import webdataset as wds", "webdataset belongs to storage"),
    "transformers in storage": ("storage/a.py", "import transformers", "may not import transformers"),
}


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, code in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(code)


@pytest.mark.parametrize("case", BAD_IMPORTS)
def test_a_forbidden_import_is_found(case: str, tmp_path: Path) -> None:
    name, code, message = BAD_IMPORTS[case]
    write_tree(tmp_path, {name: code})
    violations = arrow_violations(tmp_path)
    assert violations
    assert all(line.startswith(f"{name}:") and message in line for line in violations)


@pytest.mark.parametrize(
    ("library", "place"), [("ray", "pipeline/a.py"), ("typer", "pipeline/ui/a.py"), ("yaml", "pipeline/a.py")]
)
def test_a_library_outside_its_place_is_found(library: str, place: str, tmp_path: Path) -> None:
    write_tree(tmp_path, {place: f"import {library}"})
    assert arrow_violations(tmp_path) == [f"{place}:1: {library}: {library} belongs to {ONE_PLACE[library]}"]


def test_allowed_imports_are_not_reported(tmp_path: Path) -> None:
    allowed = {
        "storage/a.py": "import zarr, webdataset, numpy\nfrom storage import errors\nfrom . import errors",
        "stages/student/a.py": "import transformers\nfrom stages.student import losses\nimport storage",
        "stages/teacher/a.py": "from ..attention import capture\nfrom .teacher import run",
        "pipeline/cluster/a.py": "import ray\nfrom stages.teacher import teacher",
    }
    write_tree(tmp_path, allowed)
    assert arrow_violations(tmp_path) == []


UNSAFE = {
    "pickle": "import pickle",
    "from pickle": "def f():\n    from pickle import loads",
    "joblib": "import joblib",
    "torch.load": "import torch\ntorch.load('x')",
    "load from torch": "from torch import load",
    "torch.load as a value": "import torch\nread = torch.load",
    "allow_pickle": "import numpy as np\nnp.load('x', allow_pickle=True)",
    "trust_remote_code": "AutoModel.from_pretrained('x', trust_remote_code=True)",
    "from_pretrained that may ask": "AutoModel.from_pretrained('x', dtype='auto')",
    "from_config that may ask": "AutoModel.from_config(config)",
    "trust_remote_code in a dict": "options = {'trust_remote_code': True}",
}


@pytest.mark.parametrize("case", UNSAFE)
def test_an_unsafe_call_is_found(case: str, tmp_path: Path) -> None:
    write_tree(tmp_path, {"stages/a.py": UNSAFE[case]})
    assert len(unsafe_calls(tmp_path, "stages")) >= 1


def test_asking_for_remote_code_by_a_setting_is_not_reported(tmp_path: Path) -> None:
    write_tree(tmp_path, {"stages/a.py": "load('x', trust_remote_code=config.trust_remote_code)"})
    assert unsafe_calls(tmp_path, "stages") == []


def test_capture_codecs_losses_the_student_model_and_their_benchmarks_import_without_ray_zarr_and_webdataset() -> None:
    blocked = "import sys\nfor name in ('ray', 'zarr', 'webdataset'): sys.modules[name] = None\n"
    done = run_python(blocked + "\n".join(f"import {module}" for module in PURE_MODULES))
    assert done.returncode == 0, done.stderr
    assert run_python(blocked + "import zarr").returncode != 0


HELP = """
import sys
from pipeline.cli.app import main
sys.argv = ["cdp", "--help"]
try:
    main()
except SystemExit as stop:
    code = stop.code
loaded = {"torch", "ray", "transformers", "zarr"} & set(sys.modules)
sys.exit(f"exit {code}, loaded {loaded}" if code or loaded else 0)
"""


def test_help_loads_neither_torch_nor_ray_nor_transformers_nor_zarr() -> None:
    done = run_python(HELP)
    assert done.returncode == 0, done.stderr
    assert "extract-teacher" in done.stdout
