"""The page of the architecture has every module and every shape letter, and none that is gone."""

import ast
import re

from tests.docs.markdown import PAGES, ROOT
from tests.docs.module_table import module_table, parts_of_document

PACKAGES = ("stages", "storage")
_SHAPE = re.compile(r"[a-z]\w*_(?P<letters>[1-9]?[A-Z][A-Zadgknq1-9]*)$")


def test_the_list_of_modules_is_that_of_the_code() -> None:
    shown = parts_of_document()[1].strip()
    assert shown == module_table().strip(), "run: python -m tests.docs.module_table"


def test_every_module_says_what_it_owns() -> None:
    assert [line for line in module_table().splitlines() if line.endswith("|  |")] == []


def test_every_shape_letter_of_the_code_is_in_the_table() -> None:
    prose = [line for _, line in PAGES["docs/architecture.md"].prose]
    explained = {letter for line in prose if (row := re.match(r"\| `(\w)` \|", line)) for letter in row[1]}
    used = {
        letter: f"{file.relative_to(ROOT)}: {name}"
        for package in PACKAGES
        for file in sorted((ROOT / package).rglob("*.py"))
        for name in _names(file.read_text("utf-8"))
        if (shape := _SHAPE.fullmatch(name))
        for letter in shape["letters"]
        if letter.isalpha()
    }
    assert {letter: where for letter, where in used.items() if letter not in explained} == {}
    assert explained - set(used) == set()


def _names(source: str) -> set[str]:
    tree = list(ast.walk(ast.parse(source)))
    return {node.id for node in tree if isinstance(node, ast.Name)} | {
        node.arg for node in tree if isinstance(node, ast.arg)
    }
