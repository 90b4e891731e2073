"""Which option a written answer names: the parsers of suites with lettered options."""

import re
from typing import Final

_MMVP: Final = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"^\(?([ab])\)?\.?$",  # nothing else
        r"^\(?([ab])\)?[.\s]",  # in front
        r"answer\s+is\s+\(?([ab])",
        r"option\s+\(?([ab])",
        r"([ab])\)?(?:\s|$)",  # at the end of any word
        r"^([ab])",
    )
)


def leading_or_lone_letter(answer: str, letters: str) -> str | None:
    """The letter in front of an answer with a mark behind it, else the first capital of `letters` that stands alone.

    "B", "(b) onto", "C. on" and "The answer is D." are read; of "on the table" nothing is.
    """
    if found := re.match(rf"\(?([{letters}])(?:[).:,]|$)", answer.strip(), re.IGNORECASE):
        return found[1].upper()
    lone = re.search(rf"\b([{letters}])\b", answer)
    return lone[1] if lone else None


def mmvp_letter(answer: str) -> str | None:
    """A or B as lmms-eval reads it: the first of several patterns that is found; an article "a" is a letter too.

    Source: `tasks/mmvp/utils.py` of lmms-eval.
    """
    text = answer.strip()
    found = next((match for pattern in _MMVP if (match := pattern.search(text))), None)
    return found[1].upper() if found else None


def first_word_of(answer: str, yes: str, no: str) -> bool | None:
    """Whether `yes` stands as a whole word before `no`, in letters of any size; None if neither is there.

    Source: `extract_answer` of NaturalBench's `example.py`.
    """
    at_yes, at_no = (re.search(rf"\b{word}\b", answer, re.IGNORECASE) for word in (yes, no))
    if at_yes is None or at_no is None:
        return None if at_yes is at_no else at_yes is not None
    return at_yes.start() < at_no.start()
