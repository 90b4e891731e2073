"""What is said of a student by its config alone is what the library says of it, and nothing that it would not."""

import json
from pathlib import Path

import pytest

from pipeline.preflight import check_model, check_teacher
from stages.families.registry import FAMILIES
from stages.student.model.student import OWN_CLASSES
from stages.student.student_kind import VISION_PREFIXES, check_student, refuse_without_images
from stages.teacher.config import TeacherConfig
from storage.errors import UserError
from tests.tiny_families import RECIPES, make_tiny_family


def config(folder: Path, **fields: object) -> Path:
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_the_types_of_students_are_those_of_their_classes() -> None:
    assert list(VISION_PREFIXES) == [cls.config_class.model_type for cls in OWN_CLASSES]


@pytest.mark.parametrize("model_type", RECIPES)
def test_each_family_is_a_teacher_and_a_student_with_its_own_vision_tower_if_it_can_be(
    model_type: str, tmp_path: Path
) -> None:
    folder = make_tiny_family(tmp_path / model_type, model_type)
    check_teacher(TeacherConfig(checkpoint=str(folder), num_matched=1))
    assert check_model(str(folder)) == []
    if FAMILIES[model_type].why_not_with_own_vision() is None:
        assert check_student(folder, "llava", own_vision=True)["model_type"] == model_type
    if FAMILIES[model_type].decoder_alone:
        assert check_student(folder, "llava", own_vision=False)["model_type"] == model_type
        return
    with pytest.raises(UserError, match=r"is a whole multimodal model .*; give --vision own"):
        check_student(folder, "llava", own_vision=False)


LEFT_TO_THE_LIBRARY = (
    *(["Qwen2ForCausalLM"], ["GPT2LMHeadModel"], ["LlamaModel"], [], None, "Odd", [7]),
    # The library also has a language model of this type, which reads the decoder alone out of such a checkpoint.
    ["Qwen3_5ForConditionalGeneration"],
)


@pytest.mark.parametrize("classes", LEFT_TO_THE_LIBRARY)
def test_what_may_be_a_decoder_is_left_to_the_library(classes: object, tmp_path: Path) -> None:
    check_student(config(tmp_path, model_type="qwen3_5", architectures=classes), "llava", own_vision=False)


@pytest.mark.parametrize(
    "fields",
    [
        {"architectures": ["BertForMaskedLM"]},
        {"is_encoder_decoder": True},
        {"architectures": ["ViTForImageClassification"]},
    ],
)
def test_an_encoder_is_no_decoder(fields: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is of type t5, which is no causal language model; name one such as Qwen"):
        check_student(config(tmp_path, model_type="t5", **fields), "llava", own_vision=False)


@pytest.mark.parametrize(
    ("teacher", "own_vision", "message"),
    [
        ("gemma3", False, "no student can be built for a teacher of type gemma3"),
        ("gemma4", False, "no student can be built for a teacher of type gemma4"),
        ("paligemma", False, "a model of type paligemma can neither teach nor be a student"),
        ("gemma3", True, "which has no vision tower of its own"),
    ],
)
def test_a_teacher_that_can_have_no_such_student_is_named(
    teacher: str, own_vision: bool, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        check_student(config(tmp_path, model_type="qwen2"), teacher, own_vision=own_vision)


def test_a_model_takes_images_unless_its_config_speaks_of_text_alone(tmp_path: Path) -> None:
    for fields in (
        {"model_type": "molmo", "architectures": ["MolmoForCausalLM"], "vision_backbone": {}},
        {"model_type": "llava_qwen", "architectures": ["LlavaQwenForCausalLM"], "mm_vision_tower": "siglip"},
        {"model_type": "qwen2"},
    ):
        refuse_without_images(config(tmp_path, **fields))
    with pytest.raises(UserError, match="is of type qwen2, which takes no images"):
        refuse_without_images(config(tmp_path, model_type="qwen2", architectures=["Qwen2ForCausalLM"]))
