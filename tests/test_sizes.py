"""Files, functions and signatures stay small enough to be read once."""

import ast
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from tests.import_arrows import python_files
from tests.test_architecture import write_tree

ROOT = Path(__file__).parent.parent
PRODUCT = ("pipeline", "stages", "storage")

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60
"""Without the docstring."""
MAX_PARAMETERS = 8
"""Without `self` and `cls`. The flags of a command are its parameters, so functions that Typer calls are left out."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions_of(root: Path, *folders: str) -> Iterator[tuple[str, Function]]:
    """Where each function is, and its syntax tree."""
    for path in python_files(root, *folders):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, Function):
                yield f"{path.relative_to(root).as_posix()}:{node.lineno} {node.name}", node


def lines_without_docstring(function: Function) -> int:
    first, *_ = function.body
    docstring = ast.get_docstring(function, clean=False) is not None
    last_of_function = function.end_lineno or function.lineno
    in_docstring = (first.end_lineno or first.lineno) - first.lineno + 1 if docstring else 0
    return last_of_function - function.lineno + 1 - in_docstring


def num_parameters(function: Function) -> int:
    arguments = function.args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    names += [each.arg for each in (arguments.vararg, arguments.kwarg) if each is not None]
    return len([name for name in names if name not in ("self", "cls")])


def is_command(place: str, function: Function) -> bool:
    """Whether Typer calls it: a function of the command line that bears its file's name, or the callback of all."""
    return place.startswith((f"pipeline/cli/{function.name}.py", "pipeline/cli/app.py"))


def test_no_file_is_longer_than_300_lines_and_half_of_them_are_short() -> None:
    lines = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in python_files(ROOT, *PRODUCT)
    }
    assert {name: count for name, count in lines.items() if count > MAX_FILE_LINES} == {}
    assert median(count for name, count in lines.items() if not name.endswith("__init__.py")) <= 125


def test_no_function_is_longer_than_60_lines_without_its_docstring() -> None:
    lengths = {name: lines_without_docstring(function) for name, function in functions_of(ROOT, *PRODUCT)}
    assert len(lengths) > 500
    assert {name: count for name, count in lengths.items() if count > MAX_FUNCTION_LINES} == {}


def test_no_signature_has_more_than_8_parameters_but_those_of_commands() -> None:
    counts = {
        name: num_parameters(function)
        for name, function in functions_of(ROOT, *PRODUCT)
        if not is_command(name, function)
    }
    assert {name: count for name, count in counts.items() if count > MAX_PARAMETERS} == {}


def test_long_functions_and_wide_signatures_are_found(tmp_path: Path) -> None:
    body = "\n".join(f"    a{number} = {number}" for number in range(MAX_FUNCTION_LINES))
    parameters = ", ".join(f"p{number}" for number in range(MAX_PARAMETERS + 1))
    docstring = '    """First line.\n\n    More.\n    """'
    write_tree(
        tmp_path,
        {
            "stages/a.py": f"def long(self, {parameters}):\n{docstring}\n{body}\n",
            "pipeline/cli/verify.py": f"def verify({parameters}): ...\ndef other({parameters}): ...\n",
        },
    )
    found = {name.split()[-1]: (name, function) for name, function in functions_of(tmp_path, "stages", "pipeline")}
    place, long = found["long"]
    assert lines_without_docstring(long) == MAX_FUNCTION_LINES + 1
    assert num_parameters(long) == MAX_PARAMETERS + 1
    assert not is_command(place, long)
    assert is_command(*found["verify"])
    assert not is_command(*found["other"])
