"""What pyproject.toml asks for, with extras that name extras followed."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements_of(*extras: str, base: bool = True) -> list[Requirement]:
    """Those of `extras`, and with `base` those that every installation has."""
    found = [Requirement(line) for line in PROJECT["dependencies"]] if base else []
    for extra in extras:
        for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
            if requirement.name == PROJECT["name"]:
                found += requirements_of(*sorted(requirement.extras), base=False)
            else:
                found.append(requirement)
    return found


def distributions(requirements: list[Requirement]) -> set[str]:
    """`name` of each, and `name[extra]` of each extra it asks for."""
    names = {canonicalize_name(requirement.name) for requirement in requirements}
    return names | {f"{canonicalize_name(r.name)}[{extra}]" for r in requirements for extra in r.extras}
