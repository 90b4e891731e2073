"""A headless Chromium, and axe-core, which looks for faults of accessibility."""

import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

CHROMIUM = shutil.which("chromium")
AXE_WHEELS = sorted((Path(sys.prefix) / "wheels").glob("axe_playwright_python-*.whl"))


class OpenedPage:
    """A report in the browser, with all that it printed and asked for."""

    def __init__(self, page: Page, file: Path) -> None:
        self.page = page
        self.printed: list[str] = []
        self.requests: list[str] = []
        page.on("console", self._print)
        page.on("pageerror", lambda error: self.printed.append(str(error)))
        page.on("request", self._ask)
        page.goto(file.as_uri())

    def _print(self, message: ConsoleMessage) -> None:
        self.printed.append(message.text)

    def _ask(self, request: Request) -> None:
        if not request.url.startswith("data:"):
            self.requests.append(request.url)

    def after(self, act: Callable[[], object]) -> str:
        """Does something that changes what the gallery shows, and gives its pictures' pixels when they are drawn."""
        shown = self.page.get_attribute("#gallery", "data-shown")
        act()
        self.page.wait_for_function("before => document.querySelector('#gallery').dataset.shown !== before", arg=shown)
        return self.pixels()

    def pixels(self) -> str:
        """Of all pictures of the gallery."""
        self.page.wait_for_selector("#gallery[data-shown]")
        found: str = self.page.evaluate("[...document.querySelectorAll('canvas')].map(one => one.toDataURL()).join()")
        return found


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed; apt-get install chromium")
    with sync_playwright() as playwright:
        # Chromium's own sandbox needs rights that containers lack; the page is ours.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[Callable[..., OpenedPage]]:
    """Opens HTML in a window of a width, with a colour scheme."""
    contexts = []

    def open_html(html: str, scheme: str = "light", width: int = 1200) -> OpenedPage:
        file = tmp_path / f"{len(contexts)}.html"
        file.write_text(html, encoding="utf-8")
        context = browser.new_context(
            color_scheme=scheme,  # type: ignore[arg-type]
            viewport={"width": width, "height": 800},
        )
        contexts.append(context)
        return OpenedPage(context.new_page(), file)

    yield open_html
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def axe() -> str:
    """The script, as data out of a wheel that `make env` downloads."""
    if not AXE_WHEELS:
        pytest.skip("the wheel of tests/wheels.txt with axe-core is not there; run make env")
    with zipfile.ZipFile(AXE_WHEELS[-1]) as wheel:
        return wheel.read("axe_playwright_python/axe.min.js").decode()
