import re

import pytest

from benchmarks.reproduction.arms import CEILING, CLAIMED, EXPLORED
from benchmarks.reproduction.figures import FIGURES
from benchmarks.reproduction.tables import CLAIMS, PAGE, TABLES, record, with_tables


def test_the_page_has_the_tables_of_the_records() -> None:
    page = PAGE.read_text()
    assert with_tables(page) == page
    assert len(re.findall("<!-- table: ", page)) == len(TABLES)


def test_a_page_without_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="0 places for the table checks"):
        with_tables("# Nothing\n")


def test_the_records_have_every_arm_and_the_seeds_of_the_protocol() -> None:
    compared = record("compare")
    assert set(compared["arms"]) == {**CLAIMED, **CEILING}.keys()
    assert {len(runs) for runs in compared["arms"].values()} == {5}
    assert compared["settings"]["split"] == "test"
    assert set(record("explore")["arms"]) == EXPLORED.keys()
    assert record("explore")["settings"]["split"] == "validation"
    protocol = PAGE.parents[1] / "benchmarks/reproduction/PROTOCOL.md"
    for pair in CLAIMS:
        assert " - ".join(pair) in re.sub(r"[`\n ]+", " ", protocol.read_text()), pair


def test_the_page_shows_the_figures() -> None:
    for name in ("curves.svg", "final.svg"):
        assert f"({FIGURES.name}/{name})" in PAGE.read_text()
        assert (FIGURES / name).read_text().startswith("<?xml")


def test_the_readme_says_what_the_records_hold() -> None:
    arms = record("compare")["summary"]["arms"]
    pair = ("logits and attention", "logits, own projector")
    named = [f"{100 * arms[arm]['end_named']['mean']:.0f} %" for arm in pair]
    said = " ".join((PAGE.parents[1] / "README.md").read_text().split())
    expected = "with stored attention name {} of an object's neighbours at the end of a row, students without it {}"
    assert expected.format(*named) in said
    assert min(arm["colour"]["mean"] for arm in arms.values()) > 0.995
