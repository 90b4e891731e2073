"""How fast suites are answered: both ways give the same answers, and the document says what was saved."""

import json
from pathlib import Path

import pytest

from benchmarks.evaluation import OURS, PLAIN, PlainWay, measure
from benchmarks.results import RESULTS
from pipeline.demo.assets import TEACHER
from pipeline.demo.scenes.dataset import write_dataset
from pipeline.models import load_model
from stages.evaluation.answering.answerer import Answerer
from stages.evaluation.config import EvaluationConfig, SuiteConfig
from stages.evaluation.loaded_suite import load_suite
from stages.evaluation.suites.suite import Protocol


@pytest.mark.parametrize("protocol", ["compodistill", "likelihood"])
def test_the_plain_way_gives_the_same_answers(protocol: Protocol, tmp_path: Path) -> None:
    write_dataset(tmp_path, 20, 0, "shapes", 1)
    suite = load_suite("sugarcrepe", SuiteConfig(data=tmp_path / "pairs", protocol=protocol))
    questions = [question for item in suite.items for question in item.questions]
    model, processor = load_model(str(TEACHER))
    ours = Answerer(model, processor, EvaluationConfig()).answers(questions)
    plain = PlainWay(model, processor)
    for question, answer in zip(questions, ours, strict=True):
        expected = plain.answer(question)
        if isinstance(answer, str):
            assert answer == str(expected).strip()
        else:
            assert [one.total for one in answer] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_a_short_run_measures_both_ways(tmp_path: Path) -> None:
    found = measure(tmp_path, num_pairs=1, repeats=1, protocols=["likelihood"])
    assert found["likelihood"]["items"] == 5
    assert set(found["likelihood"]["items_per_s"]) == {OURS, PLAIN}


def test_the_saved_result_is_that_of_the_command_in_the_document() -> None:
    saved = json.loads((RESULTS / "evaluation.json").read_text())
    assert saved["command"] == "python -m benchmarks.evaluation"
    text = (RESULTS.parent / "README.md").read_text()
    for protocol in ("compodistill", "likelihood"):
        assert f"{saved['protocols'][protocol]['plain_wall_by_ours']:.1f}" in text
