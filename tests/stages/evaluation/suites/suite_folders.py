"""Folders of suites in their makers' layout, and a suite's metrics of answers that were written by hand."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from stages.evaluation.config import SuiteConfig
from stages.evaluation.loaded_suite import LoadedSuite, load_suite
from stages.evaluation.metrics import scored, suite_metrics
from stages.evaluation.suites.suite import Answer, Likelihood


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_lines(path: Path, records: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def draw(*paths: Path, color: str = "red", size: tuple[int, int] = (40, 30)) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, color).save(path)


def load(name: str, folder: Path, **settings: Any) -> LoadedSuite:
    return load_suite(name, SuiteConfig(data=folder, **settings))


def prompts(loaded: LoadedSuite) -> list[str]:
    return [question.prompt for item in loaded.items for question in item.questions]


def pictures(loaded: LoadedSuite, folder: Path) -> list[str]:
    """Of each item's first question, within the folder."""
    return [Path(str(item.questions[0].pictures[0].source)).relative_to(folder).as_posix() for item in loaded.items]


def metrics_of(loaded: LoadedSuite, answers: Mapping[str, Sequence[Answer]]) -> dict[str, dict[str, float]]:
    """Kind to metric to value, of answers by the item's id; rounded to 4 places."""
    items = [
        scored(item, loaded.suite.count(item, answers[item.id], loaded.protocol))
        for item in loaded.items
        if item.id in answers
    ]
    return {
        kind: {name: round(float(values[0]), 4) for name, values in of_kind.items()}
        for kind, of_kind in suite_metrics(loaded.suite, items, num_resamples=3).items()
    }


def as_likely(*log_probs: float) -> tuple[Likelihood, ...]:
    """Candidates of one token with these log-probabilities."""
    return tuple(Likelihood(value, num_tokens=1, end_log_prob=0.0) for value in log_probs)
