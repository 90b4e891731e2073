from pathlib import Path

import numpy as np
import pytest

from stages.evaluation.answered_items import AnsweredItem
from stages.evaluation.metrics import ScoredItem, metrics_of_always_yes, suite_metrics
from stages.evaluation.result import make_result, note_on_guessing
from stages.evaluation.suites.pictures import PictureFile, SuitePicture
from stages.evaluation.suites.registry import SUITES
from stages.evaluation.suites.yes_no import (
    answered_yes,
    says_yes,
    two_way_question,
    yes_no_counts,
    yes_no_metrics,
)
from tests.stages.evaluation.suites.suite_folders import as_likely
from tests.suite_runs import suite_run

ANSWERS = {"Yes": "yes", "No, it is not.": "no", "yes": "no", "There is nothing. no": "yes", "NO": "no", "no": "yes"}
"""Answer to label, as the published scripts were given them."""


def summed() -> dict[str, np.ndarray]:
    counts = [yes_no_counts(says_yes(answer), label == "yes") for answer, label in ANSWERS.items()]
    return {name: np.array([float(sum(count[name] for count in counts))]) for name in counts[0]} | {
        "items": np.array([float(len(counts))])
    }


def test_answers_give_the_metrics_of_the_script_of_pope() -> None:
    found = {name: float(values[0]) for name, values in yes_no_metrics(summed()).items()}
    assert found == pytest.approx(
        {"f1": 57.1, "accuracy": 50, "precision": 50, "recall": 66.7, "yes_share": 66.7}, abs=0.05
    )


def test_answers_give_the_metrics_of_the_script_of_r_bench() -> None:
    found = {name: float(values[0]) for name, values in yes_no_metrics(summed(), epsilon=1e-5).items()}
    golden = {"f1": 57.1422, "accuracy": 50, "precision": 49.9999, "recall": 66.6664, "yes_share": 66.6667}
    assert found == pytest.approx(golden, abs=1e-4)


def test_without_any_yes_precision_and_f1_are_zero() -> None:
    none = {"items": np.ones(1), "true_negatives": np.ones(1)}
    found = {name: float(values[0]) for name, values in yes_no_metrics(none).items()}
    assert found == {"f1": 0, "accuracy": 100, "precision": 0, "recall": 0, "yes_share": 0}


def test_the_likelier_first_token_is_the_answer_and_a_tie_is_wrong() -> None:
    assert answered_yes(as_likely(-1.0, -2.0), is_yes=False)
    assert not answered_yes(as_likely(-2.0, -1.0), is_yes=True)
    assert not answered_yes(as_likely(-1.0, -1.0), is_yes=True)
    assert answered_yes(as_likely(-1.0, -1.0), is_yes=False)


def test_yes_over_no_asks_for_the_first_tokens_of_both_words() -> None:
    picture = SuitePicture(PictureFile(Path("one.png")))
    compared = two_way_question("Is it?", picture, "yes_over_no")
    assert (compared.candidates, compared.first_token_only) == (("Yes", "No"), True)
    assert two_way_question("Is it?", picture, "generate", max_new_tokens=2).candidates == ()


@pytest.mark.parametrize(("suite", "kinds"), [("pope", ("random",)), ("r-bench-image", ("subset_1",))])
def test_what_always_saying_yes_gets_of_f1_is_that_of_its_own_answers(suite: str, kinds: tuple[str, ...]) -> None:
    labels = [True, True, False, True, False, False, False, False]
    answers = [False, True, False, True, True, False, True, False]
    items = [
        ScoredItem(kinds, str(at), yes_no_counts(*one)) for at, one in enumerate(zip(answers, labels, strict=True))
    ]
    always = [ScoredItem(kinds, str(at), yes_no_counts(True, label)) for at, label in enumerate(labels)]
    found = metrics_of_always_yes(SUITES[suite], items)
    expected = suite_metrics(SUITES[suite], always, 0)
    assert found == {kind: {"f1": of_kind["f1"]} for kind, of_kind in expected.items()}
    assert found["average"]["f1"] == pytest.approx(100 * 2 * 3 / (8 + 3), abs=2e-3)


def test_a_result_has_the_f1_of_always_saying_yes_as_its_guessing_level() -> None:
    scored = [
        ScoredItem(("yesno",), str(at), yes_no_counts(at > 1, at % 2 == 0) | {"hallucination_rate": 0})
        for at in range(4)
    ]
    answered = [AnsweredItem(one.unit, ("x",), one) for one in scored]
    result = make_result(suite_run(suite="reefknot"), answered, [], 100, 1.0, 4)
    assert "always saying yes" in note_on_guessing(result)
    metrics = result.metrics["yesno"]
    assert metrics["f1"].chance == pytest.approx(200 / 3)
    assert metrics["accuracy"].chance == 50
    assert metrics["recall"].chance is None
