from typing import Any

import pytest
import yaml

from stages.evaluation.result import Metric, SuiteResult
from stages.export.model_card import ExportReport, ModelNames, StageRecord, model_card
from stages.student.run_folder import StageDescription, StageReport, ValidationReport
from stages.student.stage_config import STAGES
from tests.suite_runs import suite_run

EXPORT = ExportReport(
    source="run/sft/student",
    model_class="LlavaForConditionalGeneration",
    custom_code=None,
    post_connector="folded",
    dtype="float32",
    trained_dtype="float32",
    parameters=10,
    bytes=40,
    image_token_id=1,
    added_rows=0,
    end_token_ids=[0],
    logit_error=0.0,
    rounding_error=0.0,
    logit_scale=1.0,
    seconds=1.0,
)
NAMES = ModelNames("some-org/decoder", "models/teacher-4b", frozenset({"some-org/decoder"}))


def card_of(
    *terms: set[str],
    vision: str = "teacher",
    validation: ValidationReport | None = None,
    evaluations: tuple[SuiteResult, ...] = (),
) -> tuple[dict[str, Any], str]:
    """Front matter and text of the card of a student whose stages had these losses."""
    history = [
        StageRecord(
            StageReport(
                stage=name,
                samples=4,
                steps=1,
                trained_parameters=5,
                seconds=1.0,
                samples_per_s=4.0,
                wait_share=0.0,
                losses=dict.fromkeys(sorted(losses), 1.0),
                validation=validation if name == "dft" else None,
            ),
            StageDescription({"targets": ["ab"], "decoder": "cd"}, {"vision": vision}),
        )
        for name, losses in zip(STAGES, terms, strict=False)
    ]
    _, front, text = model_card("student", EXPORT, history, NAMES, evaluations).split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.mark.parametrize("terms", [({"lm", "kd"}, {"lm"}), ({"lm"}, {"lm", "attention"}, {"lm"})])
def test_a_student_with_a_stage_that_learned_from_the_teacher_is_called_distilled(terms: tuple[set[str], ...]) -> None:
    front, text = card_of(*terms)
    assert front["tags"] == ["distillation", "compodistill"]
    assert "distilled from stored targets" in text
    assert "its teacher `models/teacher-4b`" in text


@pytest.mark.parametrize("vision", ["teacher", "own"])
def test_a_student_of_answers_alone_is_not_called_distilled(vision: str) -> None:
    front, text = card_of({"lm"}, {"lm"}, vision=vision)
    assert "tags" not in front
    assert "trained on answers alone, without distillation" in text
    assert "distilled" not in text
    assert ("with the vision tower of `models/teacher-4b`" in text) == (vision == "teacher")


def test_a_folder_with_a_name_like_an_id_is_no_base_model() -> None:
    front, text = card_of({"lm", "kd"})
    assert front["base_model"] == ["some-org/decoder"]
    assert "`models/teacher-4b`" in text


def test_losses_on_held_out_samples_stand_beside_those_of_training() -> None:
    held_out = ValidationReport(samples=1200, losses={"loss": 3.5, "lm": 2.5}, time_share=0.1)
    _, text = card_of({"lm", "loss"}, {"lm", "loss"}, validation=held_out)
    assert "| lm loss | loss | validation loss | validation lm loss |" in text
    assert "| 1.0000 | 1.0000 | 3.5000 | 2.5000 |" in text
    assert "on 1,200 samples that were held out of training" in text
    _, text = card_of({"lm"})
    assert "validation" not in text.lower()


def test_the_table_of_a_suite_with_f1_says_whose_guess_its_level_is() -> None:
    levels = {"pope": 66.7, "sugarcrepe": None}
    for suite, chance in levels.items():
        metric = Metric(value=70.0, interval_95=(60.0, 80.0), chance=chance)
        result = SuiteResult(
            run=suite_run(suite=suite),
            metrics={"average": {"f1" if chance else "accuracy": metric}},
            num_items={},
            num_missing=0,
            seconds=1,
            items_per_s=1,
        )
        _, text = card_of({"lm"}, evaluations=(result,))
        assert "70.0" in text
        assert ("Guessing of f1 is what always saying yes gets" in text) == (chance is not None)
