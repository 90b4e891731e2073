"""`cdp config`, and the page of all settings."""

from pathlib import Path

import pytest

from pipeline.cli.config import settings_page
from pipeline.run_file import RunFile
from stages.settings import sections_of
from tests.pipeline.processes import run_here

PAGE = Path(__file__).parents[3] / "docs" / "settings.md"


def test_the_page_of_settings_is_that_of_the_classes() -> None:
    page = settings_page([section for section in sections_of(RunFile) if section.settings])
    assert PAGE.read_text(encoding="utf-8") == page, "write it anew: cdp config --markdown > docs/settings.md"


def test_every_setting_and_every_section_says_what_it_is() -> None:
    sections = list(sections_of(RunFile))
    assert all(section.meaning for section in sections[1:])
    assert [setting.name for section in sections for setting in section.settings if not setting.meaning] == []


def test_a_section_is_shown_with_the_sections_in_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run_here("config", "train.loader", monkeypatch=monkeypatch, capsys=capsys)
    assert done.code == 0
    assert "train.loader.microbatch_size  int, at least 1; default 8; resume: free" in done.out
    assert "Samples of one forward pass on one rank" in done.out
    assert "train.dft" not in done.out
    inner = run_here("config", "train", monkeypatch=monkeypatch, capsys=capsys).out
    assert all(name in inner for name in ("train.seed", "train.dft.kd_weight", "train.loader.prefetch"))
    assert "teacher" not in inner.splitlines()[0]


def test_a_section_that_is_none_is_refused_with_those_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run_here("config", "train.loder", monkeypatch=monkeypatch, capsys=capsys)
    assert done.code == 2
    said = "there is no section or setting train.loder (did you mean train.loader?); sections are teacher, images, ext"
    assert said in done.err
    alone = run_here("config", "train.dft.learning_rate", monkeypatch=monkeypatch, capsys=capsys)
    assert "train.dft.learning_rate  float" in alone.out
    assert "batch_size" not in alone.out
