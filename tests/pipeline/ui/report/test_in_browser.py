"""The report in headless Chromium: it loads nothing, its pickers and keys work, it fits and is legible."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pipeline.report.page import Facts, Page
from pipeline.ui.report.render import render_page
from tests.pipeline.report.pages import HOSTILE, full_page, without_samples
from tests.pipeline.ui.report.conftest import OpenedPage

pytestmark = pytest.mark.slow

LONG = "a-run-that-somebody-gave-a-very-long-name-without-any-place-where-a-line-could-end"
PAGES: dict[str, Page] = {
    "two students": full_page(),
    "five students": full_page((LONG, "sft", "logits", "tau2", "rank64")),
    "no student": full_page(()),
    "no samples": without_samples(full_page()),
    "hostile text": full_page(("sft", HOSTILE), HOSTILE),
}
Open = Callable[..., OpenedPage]


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_loads_nothing_prints_nothing_and_has_no_grave_fault_of_accessibility(
    name: str, scheme: str, open_page: Open, axe: str
) -> None:
    opened = open_page(render_page(PAGES[name]), scheme)
    if PAGES[name].samples:
        opened.pixels()
    # Contrast is measured of what is seen.
    opened.page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    opened.page.evaluate(axe)
    found: dict[str, Any] = opened.page.evaluate("axe.run(document)")
    faults = [
        (one["id"], one["impact"], [node["html"][:200] for node in one["nodes"][:3]])
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]
    assert faults == []
    assert "color-contrast" in {one["id"] for one in found["passes"]}
    assert opened.printed == []
    assert len(opened.requests) == 1


@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_a_phone_without_scrolling_sideways(name: str, open_page: Open) -> None:
    page = open_page(render_page(PAGES[name]), width=360).page
    for opens in ("false", "true"):
        page.evaluate(f"document.querySelectorAll('details').forEach(one => {{ one.open = {opens} }})")
        assert page.evaluate("document.documentElement.scrollWidth") == 360


@pytest.mark.parametrize("width", [360, 1200])
def test_names_of_rows_and_columns_are_not_broken_within_a_word(width: int, open_page: Open) -> None:
    table = Facts(
        "Settings",
        ("setting", "default", "sft", "logits", "compodistill", "similarity", "alignment loss", "samples/s"),
        (("train.dft.attention_weight", *["0.3 [0.1, 0.5]"] * 7), ("replace_att", *["1"] * 7)),
    )
    page = open_page(render_page(replace(full_page(), facts=(table,))), width=width).page
    assert page.locator("th").count() > 10
    assert (
        page.evaluate(
            """[...document.querySelectorAll('section > .scroll th')].filter(one => {
            const words = document.createRange();
            words.selectNodeContents(one);
            return words.getClientRects().length > one.textContent.split(' ').length;
        }).map(one => one.textContent)"""
        )
        == []
    )


def test_every_picker_changes_the_pictures(open_page: Open) -> None:
    opened = open_page(render_page(full_page()))
    page = opened.page
    pictures = [opened.pixels()]
    pictures.append(opened.after(lambda: page.select_option("#layer", "1")))
    pictures.append(opened.after(lambda: page.uncheck("#sinks")))
    pictures.append(opened.after(lambda: page.select_option("#from", "0")))
    pictures.append(opened.after(lambda: page.select_option("#from", "2")))
    pictures.append(opened.after(lambda: page.select_option("#sample", "1")))
    assert len(set(pictures)) == len(pictures)
    # What was chosen stays, where the next sample has it too.
    assert [page.input_value(f"#{each}") for each in ("layer", "from")] == ["1", "2"]
    # Of words there are no sinks to leave out, and the teacher's attention was not computed.
    assert page.is_disabled("#sinks")
    assert "not computed" in page.inner_text("#pictures figure:nth-child(2)")
    assert opened.printed == []


def test_arrow_keys_change_the_sample_and_leave_pickers_their_own_keys(open_page: Open) -> None:
    opened = open_page(render_page(full_page()))
    page = opened.page
    first = opened.pixels()
    second = opened.after(lambda: page.keyboard.press("ArrowRight"))
    assert "blue cube 1" in page.inner_text("#answer")
    assert opened.after(lambda: page.keyboard.press("ArrowLeft")) == first != second
    assert opened.after(lambda: page.keyboard.press("ArrowLeft")) not in (first, second)
    assert "blue cube 2" in page.inner_text("#answer")
    page.focus("#layer")
    assert opened.after(lambda: page.keyboard.press("ArrowDown"))
    assert page.input_value("#layer") == "0"
    assert page.input_value("#sample") == "2"


def test_every_picker_is_reached_by_tab_and_shows_that_it_is(open_page: Open) -> None:
    opened = open_page(render_page(full_page()))
    page, reached = opened.page, []
    opened.pixels()
    for _ in range(40):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            "(one => [one.id || one.className, getComputedStyle(one).outlineStyle])(document.activeElement)"
        )
        assert outline == "solid"
        reached.append(name)
        if name == "sinks":
            break
    assert reached[0] == "skip"
    assert reached[-6:] == ["before", "sample", "next", "layer", "from", "sinks"]


def test_answers_are_shown_with_whether_they_were_right(open_page: Open) -> None:
    opened = open_page(render_page(full_page()))
    opened.pixels()
    said = opened.page.inner_text("#answers")
    assert "Is there a cube?" in said
    assert "teacher: a cube \u2713 right" in " ".join(said.split("\n"))
    assert "sft: a cube \u2717 wrong" in " ".join(said.split("\n"))


def test_hostile_text_is_read_and_not_obeyed(open_page: Open) -> None:
    opened = open_page(render_page(PAGES["hostile text"]))
    opened.pixels()
    page = opened.page
    assert page.locator("script").count() == 2
    assert page.locator("main b").count() == 0
    for shown in (page.title(), page.inner_text("h1"), page.inner_text("#question"), page.inner_text("#answers")):
        assert "<script>alert(1)</script>" in shown
        assert "\\x1b[31m\\u202eevil\\u2066" in shown
    assert page.locator("#from option").last.inner_text().startswith("word 3: word2</script>")


def test_without_scripts_the_page_says_what_is_missing(browser: Any, tmp_path: Any) -> None:
    (tmp_path / "page.html").write_text(render_page(full_page()))
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto((tmp_path / "page.html").as_uri())
    assert page.is_visible("noscript")
    assert "83.0" in page.inner_text("main")
