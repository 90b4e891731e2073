"""Pages are narrow enough to read, their links lead somewhere, and what they name of the code exists."""

import ast
import re

import pytest

from tests.docs.markdown import PAGES, ROOT, Page

WIDTH = 120
PRODUCT = ("pipeline", "stages", "storage")
_SOURCE = re.compile(r"Source:\s+(docs/[\w.-]+\.md)#([\w-]+)")
_FILE = re.compile(r"(?<![\w./-])(?:docs|pipeline|stages|storage|tests|benchmarks|examples)/[\w./-]*\w\.\w+")

pages = pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)


@pages
def test_no_line_is_too_long_but_tables_and_addresses(page: Page) -> None:
    long = [n for n, line in enumerate(page.lines, 1) if len(line) > WIDTH and not line.lstrip().startswith("|")]
    assert [n for n in long if "://" not in page.lines[n - 1]] == []


@pages
def test_every_relative_link_and_its_anchor_exist(page: Page) -> None:
    for link in page.links:
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        file = ((ROOT / page.path).parent / name).resolve() if name else ROOT / page.path
        assert file.exists(), link
        if anchor:
            assert anchor in PAGES[file.relative_to(ROOT).as_posix()].anchors, link


@pages
def test_every_file_that_is_named_exists(page: Page) -> None:
    missing = [
        name
        for span in [*page.spans, *page.blocks("bash", "")]
        for name in _FILE.findall(span)
        if "NAME." not in name and not (ROOT / name).exists()
    ]
    assert missing == []


def test_every_source_in_a_docstring_is_a_heading_of_its_page() -> None:
    sources = [
        (file.relative_to(ROOT).as_posix(), *found)
        for package in PRODUCT
        for file in sorted((ROOT / package).rglob("*.py"))
        for found in _SOURCE.findall(file.read_text("utf-8"))
    ]
    assert len(sources) >= 5
    assert [source for source in sources if source[1] not in PAGES or source[2] not in PAGES[source[1]].anchors] == []


def test_no_docstring_names_a_document_that_is_not_there() -> None:
    for package in PRODUCT:
        for file in (ROOT / package).rglob("*.py"):
            text = file.read_text("utf-8")
            assert "METHOD" not in text, file
            for name in re.findall(r"docs/[\w.-]+\.\w+", text):
                assert (ROOT / name).exists(), f"{file}: {name}"


@pytest.mark.parametrize("name", ["docs/method.md", "docs/architecture.md"])
def test_functions_and_classes_are_in_the_files_that_a_table_names(name: str) -> None:
    rows = [line.split("|") for _, line in PAGES[name].prose if line.rstrip().endswith(".py` |")]
    assert len(rows) >= 5
    for *_, names, file, _ in rows:
        defined = {
            node.name
            for node in ast.parse((ROOT / file.strip(" `")).read_text("utf-8")).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        }
        assert set(re.findall(r"`([^`]+)`", names)) <= defined, file


def test_the_glossary_is_in_alphabetical_order_and_says_each_term_in_one_sentence() -> None:
    rows = [line.strip("| ").split(" | ") for _, line in PAGES["docs/glossary.md"].prose if line.startswith("| ")][2:]
    terms = [term.lower() for term, _ in rows]
    assert terms == sorted(terms)
    assert all(meaning.endswith(".") and ". " not in meaning for _, meaning in rows)
