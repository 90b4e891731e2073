import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.import_arrows import OWN, imported_modules, python_files
from tests.requirements import PROJECT, ROOT, distributions, requirements_of

DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml", "google": "google-crc32c"}
"""Imported name -> distribution, where they differ by more than case and dashes."""

EXTRAS: dict[str, tuple[str, ...]] = {
    "pipeline": ("digits",),
    "stages": ("datasets", "gguf", "wandb"),
    "storage": ("s3",),
    "examples": ("digits",),
    "benchmarks": ("all", "benchmarks"),
}
"""Folder -> the extras that its files may import from, where a user asks for what they are for."""

PLUGIN = ROOT / "pipeline" / "lmms_eval"

HOSTS = {
    "lmms-eval": "loads our plug-in, which runs only there; it is installed in an environment of its own",
    "loguru": "lmms-eval prints with it",
    "tqdm": "lmms-eval shows its progress with it",
}
"""What `pipeline/lmms_eval/` may import, and why nothing of ours asks for it."""

NOT_IMPORTED = {
    "num2words": "transformers' SmolVLM processor imports it",
    "tensorboard": "accelerate's tracker and `tensorboard --logdir` use it",
}
"""Asked for without an import of ours, and why."""

OF_TORCHS_BUILD = re.compile(r"nvidia-.*|cuda-.*|triton")
"""Torch pins them itself, and its CPU build has none."""


def undeclared(root: Path, folder: str) -> list[str]:
    """One line for each import in `folder` of a package that neither the dependencies nor its extras name."""
    declared = distributions(requirements_of(*EXTRAS[folder]))
    return [
        f"{path.relative_to(root).as_posix()}:{line}: {name}"
        for path in python_files(root, folder)
        for line, name in imported_modules(path, root)
        if (package := name.split(".")[0]) not in OWN | sys.stdlib_module_names
        and distribution_of(package) not in declared | (HOSTS.keys() if path.parent == PLUGIN else set())
    ]


def distribution_of(package: str) -> str:
    return canonicalize_name(DISTRIBUTIONS.get(package, package))


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def installed_below(requirements: list[Requirement]) -> Iterator[str]:
    """Every distribution that the requirements bring into this environment, by the installed metadata."""
    seen: set[tuple[str, str]] = set()
    waiting = [(r.name, extra) for r in requirements for extra in ["", *r.extras]]
    while waiting:
        name, extra = waiting.pop()
        if (key := (canonicalize_name(name), extra)) in seen:
            continue
        seen.add(key)
        yield key[0]
        for line in metadata.requires(name) or []:
            below = Requirement(line)
            if below.marker is None or below.marker.evaluate({"extra": extra}):
                waiting += [(below.name, of_below) for of_below in ["", *below.extras]]


@pytest.mark.parametrize("folder", EXTRAS)
def test_every_imported_package_is_asked_for_by_name(folder: str) -> None:
    assert undeclared(ROOT, folder) == []


def test_an_undeclared_import_is_found(tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "a.py").write_text("import os, torch\ndef f():\n    from zstandard import train_dictionary")
    assert {line.split(": ")[0] for line in undeclared(tmp_path, "stages")} == {"stages/a.py:3"}


def test_every_requirement_is_imported_or_has_a_reason() -> None:
    imported = {
        distribution_of(name.split(".")[0])
        for path in python_files(ROOT, *EXTRAS)
        for _, name in imported_modules(path, ROOT)
    }
    wanted = {canonicalize_name(requirement.name) for requirement in requirements_of("all", "benchmarks")}
    assert wanted - imported == set(NOT_IMPORTED)


def test_all_has_every_extra_that_is_for_running_something() -> None:
    extras = set(PROJECT["optional-dependencies"]) - {"all", "dev", "benchmarks"}
    assert distributions(requirements_of("all")) == distributions(requirements_of(*sorted(extras)))
    assert distributions(requirements_of("all", "benchmarks")) < distributions(requirements_of("dev"))


def test_each_pinned_version_satisfies_its_bound_and_nothing_asked_for_is_without_one() -> None:
    pinned = pins()
    for requirement in requirements_of("dev"):
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, str(requirement)


def test_constraints_name_what_the_environment_of_development_is_made_of_and_nothing_else() -> None:
    made_of = {name for name in installed_below(requirements_of("dev")) if not OF_TORCHS_BUILD.fullmatch(name)}
    assert made_of == set(pins())
