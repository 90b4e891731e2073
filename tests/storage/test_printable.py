"""Text of others is shown as it is, but for what steers a terminal or is not seen."""

import unicodedata

import pytest

from storage.printable import printable
from storage.strict_model import StrictModel

UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def test_controls_formats_surrogates_and_line_separators_become_escapes_and_nothing_else_does():
    shown = {char: printable(char) for char in map(chr, [*range(0x12000), *range(0xE0000, 0xE0200)])}
    assert {char for char, text in shown.items() if text != char} == {
        c for c in shown if unicodedata.category(c) in UNSEEN
    }
    assert all(text.isascii() and text.isprintable() for char, text in shown.items() if text != char)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2Jx", r"\x1b[2Jx"),
        ("\x9b2J", r"\x9b2J"),
        ("a\u202eb\u2066\u200b", r"a\u202eb\u2066\u200b"),
        ("\u2028\udcff\U000e0041", r"\u2028\udcff\U000e0041"),
        ("né 図 😀 [/x]", "né 図 😀 [/x]"),
        ("a\r\n\tb", r"a\r\n\tb"),
    ],
)
def test_escapes_are_those_of_python(text, shown):
    assert printable(text) == shown


def test_line_ends_of_our_own_stay():
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"


class Report(StrictModel):
    words: dict[str, str]
    loss: float = 0.5


def test_a_report_is_ascii_and_is_read_back_as_it_was():
    report = Report(words={"é\x9b\u202e": "\x7f\x1b 図"})
    assert report.to_json().replace("\n", "").isprintable()
    assert report.to_json().isascii()
    assert Report.model_validate_json(report.to_json()) == report


def test_a_report_with_half_a_character_or_no_finite_number_is_json():
    text = Report(words={"a": "\udcff"}, loss=float("nan")).to_json()
    assert '"loss": null' in text
    assert "NaN" not in text
