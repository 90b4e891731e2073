"""A real model, asked through the frame: pictures out of tables and archives, answers saved and scored again."""

import hashlib
import json
from pathlib import Path
from typing import Any, get_args

import pytest

from stages.evaluation.answering.answerer import Answerer
from stages.evaluation.config import EvaluationConfig, SuiteConfig
from stages.evaluation.loaded_suite import load_suite
from stages.evaluation.result import item_line
from stages.evaluation.suites.registry import SUITES
from stages.evaluation.suites.suite import Likelihood, Protocol
from tests.stages.evaluation.suites.scorer import draw, write_parquet


@pytest.fixture
def bivlc(tmp_path: Path) -> Path:
    red, blue = (draw(tmp_path / f"{color}.png", color, (40, 30)).read_bytes() for color in ("red", "blue"))
    texts = {"caption": "A red square.", "negative_caption": "A blue square.", "type": "swap", "subtype": "att"}
    row = {"image": {"bytes": red, "path": None}, "negative_image": {"bytes": blue, "path": None}, **texts}
    write_parquet(tmp_path / "hub" / "test.parquet", [row, row | {"image": row["negative_image"]}])
    return tmp_path / "hub"


@pytest.mark.parametrize("protocol", ["likelihood", "yes_probability", "compodistill"])
def test_answers_about_pictures_of_a_table_are_saved_so_that_they_can_be_scored_again(
    protocol: Protocol, bivlc: Path, model: Any, processor: Any
) -> None:
    loaded = load_suite("bivlc", SuiteConfig(data=bivlc, protocol=protocol))
    answerer = Answerer(model, processor, EvaluationConfig())
    given = iter(answerer.answers([question for item in loaded.items for question in item.questions]))
    lines = []
    for item in loaded.items:
        answers = [next(given) for _ in item.questions]
        digests = {
            picture.source: hashlib.sha256(picture.source.read()).hexdigest()
            for question in item.questions
            for picture in question.pictures
        }
        line = json.loads(item_line(item, answers, loaded.suite.count(item, answers, protocol), digests))
        assert {digest for asked in line["questions"] for digest in asked["sha256"]} == set(digests.values())
        saved = [one if isinstance(one, str) else tuple(Likelihood(*each) for each in one) for one in line["answers"]]
        assert saved == answers
        assert loaded.suite.count(item, saved, protocol) == line["counts"]
        lines.append(line)
    # The second row's two pictures are the same, so all of its comparisons across pictures are ties.
    if protocol != "compodistill":
        assert lines[1]["counts"]["T2I"] == lines[1]["counts"]["Tpos2I"] == 0


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_a_suite_has_protocols_of_the_list_and_says_where_it_is_from(suite: Any) -> None:
    assert suite.protocols
    assert set(suite.protocols) <= set(get_args(Protocol))
    assert len(set(suite.protocols)) == len(suite.protocols)
    assert suite.source
    assert suite.fetch
    assert suite.__doc__
