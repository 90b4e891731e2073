from pathlib import Path

import numpy as np
import pytest

from stages.evaluation.suites.pictures import PictureFile, SuitePicture
from stages.evaluation.suites.yes_no import (
    answered_yes,
    says_yes,
    two_way_question,
    yes_no_counts,
    yes_no_metrics,
)
from tests.stages.evaluation.suites.suite_folders import as_likely

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
