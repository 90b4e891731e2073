"""Short free answers: how they are asked for, EvalAI's processing of them, and the soft accuracy over ten people.

Source: `m4c_evaluator.py` of LLaVA and `vqa_eval_metric.py` of lmms-eval, which give the same.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

SHORT_ANSWER: Final = "\nAnswer the question using a single word or phrase."
"""What LLaVA writes behind a question."""
LLAVA_TOKENS: Final = 128
"""Of an answer at most, in LLaVA's and CompoDistill's `model_vqa_loader.py`; lmms-eval's tasks allow 16."""

_WITH_APOSTROPHES: Final = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've "
    "why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're "
    "you've"
)
_CONTRACTIONS: Final = {
    form[: found.start()] + form[found.end() :]: form
    for form in _WITH_APOSTROPHES.split()
    for found in re.finditer("'", form)
} | {"somebody'd": "somebodyd"}
"""Forms that lack one of their apostrophes; the last one is wrong in the published table and stays so."""
_NUMBERS: Final = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())  # noqa: SIM905
}
_ARTICLES: Final = frozenset({"a", "an", "the"})
_PUNCTUATION: Final = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER: Final = re.compile(r"(?<=\d),+(?=\d)")
_PERIOD: Final = re.compile(r"\.(?!\d)")
_PERIODS_DROPPED: Final = 32
"""The published code gives a flag of this value in the place of a count."""


@lru_cache(maxsize=2**16)
def evalai_answer(text: str) -> str:
    """An answer as EvalAI's servers compare it.

    Commas and question marks go, "'s" becomes a word of its own, then as `vqa_answer`.
    """
    words = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return vqa_answer(words.replace("\n", " ").replace("\t", " ").strip())


@lru_cache(maxsize=2**16)
def vqa_answer(text: str) -> str:
    """An answer as the evaluation of VQAv2 compares it: without punctuation and articles, numbers as digits.

    A mark of punctuation goes where a blank is beside one of its kind or a number has a comma, else it becomes a blank.
    """
    joined = _COMMA_IN_NUMBER.search(text) is not None
    found = text
    for mark in _PUNCTUATION:
        goes = joined or f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if goes else " ")
    found = _PERIOD.sub("", found, count=_PERIODS_DROPPED)
    words = [_NUMBERS.get(word, word) for word in found.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def soft_accuracy(answer: str, given: Sequence[str]) -> float:
    """Mean over people of how many of the others gave this answer, a third for each and 1 at most.

    Both are compared as they are. Source: Antol et al., "VQA: Visual Question Answering", 2015.
    """
    same = sum(one == answer for one in given)
    return sum(min(1.0, (same - (one == answer)) / 3) for one in given) / len(given)


def evalai_accuracy(answer: str, given: Sequence[str]) -> float:
    """The soft accuracy of TextVQA and VizWiz."""
    return soft_accuracy(evalai_answer(answer), [evalai_answer(one) for one in given])


def vqa_v2_accuracy(answer: str, given: Sequence[str]) -> float:
    """The soft accuracy of VQAv2: of both sides punctuation, digits and articles are processed, and no more."""
    answer, *given = (vqa_answer(one.replace("\n", " ").replace("\t", " ").strip()) for one in (answer, *given))
    return soft_accuracy(answer, given)
