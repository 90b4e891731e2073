"""The import arrows and the banned calls, checked on the syntax tree of every file, also inside functions."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

LAYERS = {
    "storage": {"storage"},
    "stages": {"stages", "storage"},
    "pipeline": {"pipeline", "stages", "storage"},
}
"""What each package of the product may import of this repository."""

OWN = {"storage", "stages", "pipeline", "examples", "benchmarks", "tests"}

APART = ("stages.teacher", "stages.student")

ONE_PLACE = {"ray": "pipeline/cluster/", "typer": "pipeline/cli/", "yaml": "pipeline/run_file.py"}
"""The one folder or file that imports each of these libraries."""

ONLY_STORAGE = ("zarr", "webdataset")

UNSAFE_MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib")
_LOADERS = ("from_pretrained", "from_config")


def arrow_violations(root: Path) -> list[str]:
    """One line for each import in `root`'s packages that an arrow forbids."""
    found: list[str] = []
    for path in python_files(root, *LAYERS):
        place = path.relative_to(root).as_posix()
        modules = imported_modules(path, root)
        found += [f"{place}:{line}: {name}: {why}" for line, name in modules if (why := _forbidden(place, name))]
    return found


def package_circles(root: Path) -> list[list[str]]:
    """Folders of the product that import each other in a circle, each circle as a sorted list of dotted names."""
    packages = {_dotted(path.parent, root) for path in python_files(root, *LAYERS)}
    modules = {_dotted(path.with_suffix(""), root): _dotted(path.parent, root) for path in python_files(root, *LAYERS)}
    arrows: dict[str, set[str]] = {package: set() for package in packages}
    for path in python_files(root, *LAYERS):
        here = _dotted(path.parent, root)
        for _, name in imported_modules(path, root):
            there = modules.get(name, name if name in packages else None)
            if there is not None and there != here:
                arrows[here].add(there)
    reached = {package: _reachable(arrows, package) for package in packages}
    circles = {frozenset(b for b in reached[a] if a in reached[b]) for a in packages}
    return sorted(sorted(circle) for circle in circles if circle)


def _reachable(arrows: dict[str, set[str]], start: str) -> set[str]:
    """Packages that an import of `start` leads to, itself only if a circle leads back."""
    seen: set[str] = set()
    waiting = list(arrows[start])
    while waiting:
        if (package := waiting.pop()) not in seen:
            seen.add(package)
            waiting += arrows[package]
    return seen


def _dotted(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).parts)


def unsafe_calls(root: Path, *folders: str) -> list[str]:
    """One line for each use of pickle, torch.load, allow_pickle=True or trust_remote_code=True.

    Also for each `from_pretrained` or `from_config` that does not say `trust_remote_code`: the library would ask.
    """
    found = []
    for path in python_files(root, *folders):
        place = path.relative_to(root).as_posix()
        found += [
            f"{place}:{line}: imports {name}"
            for line, name in imported_modules(path, root)
            if any(_within(name, unsafe) for unsafe in UNSAFE_MODULES) or name == "torch.load"
        ]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and _dotted_name(node) == "torch.load":
                found.append(f"{place}:{node.lineno}: torch.load")
            loader = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
            if loader in _LOADERS and "trust_remote_code" not in {keyword.arg for keyword in node.keywords}:
                found.append(f"{place}:{node.lineno}: {loader} without trust_remote_code")
            found += [f"{place}:{line}: {name}=True" for line, name in _true_settings(node)]
    return sorted(set(found))


def imported_modules(path: Path, root: Path) -> tuple[tuple[int, str], ...]:
    """(line, dotted name) of every import; `from a import b` gives `a` and `a.b`, since b may be a module."""
    return _imports(path.read_text(encoding="utf-8"), path.relative_to(root).parent.parts)


@cache
def _imports(source: str, package: tuple[str, ...]) -> tuple[tuple[int, str], ...]:
    """Of one file in `package`; the product's files are asked for by many tests and parsed once."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.append((node.lineno, module))
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and _dotted_name(node.func) in (
            "importlib.import_module",
            "import_module",
            "__import__",
        ):
            names = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
            found += [(node.lineno, name) for name in names if isinstance(name, str)]
    return tuple(found)


def python_files(root: Path, *folders: str) -> list[Path]:
    """Every Python file below the folders of `root`."""
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def _forbidden(place: str, name: str) -> str | None:
    package, imported = place.split("/")[0], name.split(".")[0]
    module = place.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    if imported in OWN and imported not in LAYERS[package]:
        return f"{package} may not import {imported}"
    for here, there in (APART, APART[::-1]):
        if _within(module, here) and _within(name, there):
            return f"{here} and {there} may not know each other"
    if imported in ONE_PLACE and not place.startswith(ONE_PLACE[imported]):
        return f"{imported} belongs to {ONE_PLACE[imported]}"
    if package != "storage" and imported in ONLY_STORAGE:
        return f"{imported} belongs to storage"
    if package == "storage" and imported == "transformers":
        return "storage may not import transformers"
    return None


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _true_settings(node: ast.AST) -> Iterator[tuple[int, str]]:
    names = ("trust_remote_code", "allow_pickle")
    if isinstance(node, ast.keyword) and node.arg in names and _is_true(node.value):
        yield node.lineno, node.arg
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and key.value in names and _is_true(value):
                yield node.lineno, str(key.value)


def _is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def _dotted_name(node: ast.expr) -> str | None:
    """`a` or `a.b`; None for any other expression. Much cheaper than `ast.unparse`."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return f"{node.value.id}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None
