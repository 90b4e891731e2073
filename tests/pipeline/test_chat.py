from collections.abc import Callable

import pytest

from pipeline.chat import answer


class SaysAlways:
    """A conversation in which every answer is the same."""

    def __init__(self, text: str) -> None:
        self.text = text

    def ask(self, question: str, write: Callable[[str], object]) -> str:
        write(self.text)
        return self.text


@pytest.mark.parametrize(("text", "note"), [("red", ""), ("", "(an empty answer: the model ended it at once)\n")])
def test_an_empty_answer_is_said_to_be_one(text: str, note: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer(SaysAlways(text), "What colour is it?")
    assert capsys.readouterr() == (f"{text}\n", note)
