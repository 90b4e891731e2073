import math
from typing import Any

import pytest
from stages.evaluation.caption_pairs import CaptionPair
from stages.evaluation.evaluate_pairs import evaluate_pairs
from stages.evaluation.report import EvaluationReport

from stages.evaluation.config import EvaluationConfig
from storage.errors import UserError
from tests.stages.evaluation.advances import Advances


@pytest.mark.parametrize("scoring", ["likelihood", "letters"])
def test_a_report_sums_up_by_kind_and_survives_json(
    scoring: Any, model: Any, processor: Any, pairs: list[CaptionPair]
) -> None:
    by_kind = {"swap_obj": pairs[:3], "add_att": pairs[3:]}
    config = EvaluationConfig(scoring=scoring, batch_size=2)
    progress = Advances()
    report = evaluate_pairs(model, processor, by_kind, config, progress, title="evaluate it")
    assert (progress.titles, progress.amounts) == (["evaluate it: 5 pairs"], [2, 1, 2])
    assert {kind: result.num_pairs for kind, result in report.kinds.items()} == {"swap_obj": 3, "add_att": 2}
    for result in report.kinds.values():
        low, high = result.interval_95
        assert 0 <= low < result.accuracy < high <= 1 or result.accuracy in (0, 1)
        assert (result.first_letter_share is None) == (scoring == "likelihood")
    mean = sum(result.accuracy for result in report.kinds.values()) / 2
    assert report.average == pytest.approx(mean)
    assert (report.num_pairs, report.scoring) == (5, scoring)
    assert report.pairs_per_s == pytest.approx(5 / report.seconds)
    assert (report.dtype, report.image_backend) == ("float32", "SiglipImageProcessorPil")
    assert report.model == model.name_or_path
    assert EvaluationReport.model_validate_json(report.model_dump_json()) == report


def test_equal_captions_are_a_tie_in_likelihood(model: Any, processor: Any, pairs: list[CaptionPair]) -> None:
    same = [CaptionPair(p.kind, p.key, p.image, p.caption, p.caption) for p in pairs]
    report = evaluate_pairs(model, processor, {"same": same}, EvaluationConfig())
    assert report.average == 0.5


def test_the_model_is_left_in_the_mode_it_came_in(model: Any, processor: Any, pairs: list[CaptionPair]) -> None:
    model.train()
    evaluate_pairs(model, processor, {"swap_obj": pairs[:1]}, EvaluationConfig())
    assert model.training
    model.eval()
    evaluate_pairs(model, processor, {"swap_obj": pairs[:1]}, EvaluationConfig())
    assert not model.training


def test_a_damaged_model_is_named_as_such(model: Any, processor: Any, pairs: list[CaptionPair]) -> None:
    model.lm_head.weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match="not finite for 5 of 5 pairs"):
        evaluate_pairs(model, processor, {"swap_obj": pairs}, EvaluationConfig())


@pytest.mark.parametrize("by_kind", [{}, {"swap_obj": []}])
def test_nothing_to_evaluate_is_an_error(by_kind: Any, model: Any, processor: Any) -> None:
    with pytest.raises(UserError, match="no pairs"):
        evaluate_pairs(model, processor, by_kind, EvaluationConfig())
