"""A model whose scores a test writes down, asked as suites ask, and the metrics that come of its answers."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
from PIL import Image
from pyarrow import parquet

from stages.evaluation.config import SuiteConfig
from stages.evaluation.loaded_suite import LoadedSuite, load_suite
from stages.evaluation.metrics import scored, suite_metrics
from stages.evaluation.suites.captions import LETTER_QUESTION, YES_QUESTION
from stages.evaluation.suites.suite import Answer, Likelihood, Question

PAIR = re.compile(re.escape(LETTER_QUESTION).replace(r"\{a\}", "(.*)").replace(r"\{b\}", "(.*)"))
YES = re.compile(re.escape(YES_QUESTION).replace(r"\{caption\}", "(.*)"))

Scores = Mapping[str, float | Mapping[str, float]]
"""By caption: of every picture, or by the stem of a picture's file name."""


def load(name: str, folder: Path, **config: Any) -> LoadedSuite:
    return load_suite(name, SuiteConfig(data=folder, **config))


def values(loaded: LoadedSuite, scores: Scores, *, letter: str | None = None) -> dict[str, dict[str, float]]:
    """The metrics of a model with these scores; with `letter` it always writes this one."""
    items = []
    for item in loaded.items:
        answers = [letter if letter else answer_of(question, scores) for question in item.questions]
        items.append(scored(item, loaded.suite.count(item, answers, loaded.protocol)))
    metrics = suite_metrics(loaded.suite, items, num_resamples=100)
    return {kind: {name: round(float(each[0]), 6) for name, each in one.items()} for kind, one in metrics.items()}


def answer_of(question: Question, scores: Scores) -> Answer:
    (picture,) = question.pictures

    def score(caption: str) -> float:
        found = scores[caption]
        return found if isinstance(found, float) else found[Path(str(picture.source).rsplit(" ", 1)[-1]).stem]

    if pair := PAIR.fullmatch(question.prompt):
        return "A" if score(pair[1]) > score(pair[2]) else "B"
    if asked := YES.fullmatch(question.prompt):
        assert (question.candidates, question.first_token_only) == (("Yes",), True)
        return (Likelihood(score(asked[1]), 1, 0.0),)
    return tuple(Likelihood(score(caption), 1, 0.0) for caption in question.candidates)


def draw(path: Path, color: str = "red", size: tuple[int, int] = (8, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
