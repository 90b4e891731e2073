"""The import arrows and the banned calls, checked on the syntax tree of every file, also inside functions."""

import ast
from collections.abc import Iterator
from pathlib import Path

LAYERS = {
    "storage": {"storage"},
    "stages": {"stages", "storage"},
    "pipeline": {"pipeline", "stages", "storage", "examples"},
}
"""What each package of the product may import of this repository."""

OWN = {"storage", "stages", "pipeline", "examples", "benchmarks", "tests"}

APART = ("stages.teacher", "stages.student")

ONE_FILE = ("ray", "typer", "yaml")
"""Each imported in one file of pipeline and in no other."""

ONLY_STORAGE = ("zarr", "webdataset")

UNSAFE_MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib")


def arrow_violations(root: Path) -> list[str]:
    """One line for each import in `root`'s packages that an arrow forbids."""
    found: list[str] = []
    users: dict[str, list[str]] = {library: [] for library in ONE_FILE}
    for path in python_files(root, *LAYERS):
        place = path.relative_to(root).as_posix()
        modules = list(imported_modules(path, root))
        found += [f"{place}:{line}: {name}: {why}" for line, name in modules if (why := _forbidden(place, name))]
        for library in ONE_FILE:
            if any(_within(name, library) for _, name in modules):
                users[library].append(place)
    for library, places in users.items():
        if len(places) > 1:
            found.append(f"{library} is imported in {len(places)} files: {', '.join(places)}")
    return found


def unsafe_calls(root: Path, *folders: str) -> list[str]:
    """One line for each use of pickle, torch.load, allow_pickle=True or trust_remote_code=True."""
    found = []
    for path in python_files(root, *folders):
        place = path.relative_to(root).as_posix()
        found += [
            f"{place}:{line}: imports {name}"
            for line, name in imported_modules(path, root)
            if any(_within(name, unsafe) for unsafe in UNSAFE_MODULES) or name == "torch.load"
        ]
        for node in ast.walk(_parse(path)):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
                found.append(f"{place}:{node.lineno}: torch.load")
            found += [f"{place}:{line}: {name}=True" for line, name in _true_settings(node)]
    return sorted(set(found))


def imported_modules(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import; `from a import b` gives `a` and `a.b`, since b may be a module."""
    package = path.relative_to(root).parent.parts
    for node in ast.walk(_parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "import_module",
            "__import__",
        ):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield node.lineno, argument.value


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
    if package != "pipeline" and imported in ONE_FILE:
        return f"{imported} belongs to pipeline"
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


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
