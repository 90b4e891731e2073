"""Families that are refused, and that the library still gives the reason for it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import is_torchvision_available

from pipeline.preflight import check_teacher
from stages.checkpoints.processors import load_processor
from stages.families.registry import FAMILIES, REFUSED, family_of
from stages.teacher.config import TeacherConfig
from storage.errors import UserError
from tests.checkpoints import make_tiny_llava
from tests.tiny_recipes import SIGLIP, TEXT

IMAGE, MARK = 5, 6


def eager(model_type: str, **settings: Any) -> Any:
    config = AutoConfig.for_model(model_type, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_family_that_cannot_teach_is_refused_with_the_reason(model_type: str, tmp_path: Path) -> None:
    assert model_type not in FAMILIES
    with pytest.raises(UserError) as caught:
        family_of(model_type)
    assert REFUSED[model_type] in str(caught.value)
    folder = make_tiny_llava(tmp_path / "teacher")
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"model_type": "llava"', f'"model_type": "{model_type}"'))
    with pytest.raises(UserError, match=f"a model of type {model_type} can neither teach"):
        check_teacher(TeacherConfig(checkpoint=str(folder)))


def test_image_tokens_of_paligemma_attend_to_the_question() -> None:
    vision = {**SIGLIP, "projection_dim": 32}
    model = eager(
        "paligemma",
        text_config={**TEXT, "model_type": "gemma2", "vocab_size": 32, "pad_token_id": 0},
        vision_config=vision,
        image_token_id=IMAGE,
        projection_dim=32,
    )
    maps = []
    for word in (7, 8):
        ids = torch.tensor([[*[IMAGE] * 16, word, 9]])
        with torch.no_grad():
            outputs = model(
                input_ids=ids,
                pixel_values=torch.ones(1, 3, 32, 32),
                token_type_ids=torch.zeros_like(ids),
                output_attentions=True,
            )
        maps.append(outputs.attentions[1][0].mean(0))
    assert float(maps[0][:16, 16:].min()) > 0
    assert not torch.allclose(maps[0][:16, :16], maps[1][:16, :16], atol=1e-4)


def test_image_tokens_of_molmo2_attend_to_what_stands_behind_the_last_of_them() -> None:
    model = eager(
        "molmo2",
        text_config={**TEXT, "vocab_size": 32, "additional_vocab_size": 8},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
        },
        adapter_config={"vision_feature_layer": [1], "text_hidden_size": 32, "intermediate_size": 32},
        image_patch_id=IMAGE,
    )
    ids = torch.tensor([[1, IMAGE, IMAGE, MARK, 9]])
    with torch.no_grad():
        attentions = model(
            input_ids=ids,
            mm_token_type_ids=torch.tensor([[0, 1, 1, 1, 0]]),
            output_attentions=True,
        ).attentions
    assert float(attentions[0][0, :, 1:3, 3].min()) > 0
    assert float(attentions[0][0, :, 1:4, 4].max()) == 0


def test_the_library_has_no_llama4_without_its_head_and_no_phi4_of_images_and_text() -> None:
    text = {**TEXT, "vocab_size": 32, "intermediate_size_mlp": 32, "num_local_experts": 2, "pad_token_id": 0}
    config = AutoConfig.for_model("llama4", text_config=text)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert model.base_model is model
    assert "phi4_multimodal" not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
def test_a_processor_that_needs_torchvision_says_so(tmp_path: Path) -> None:
    for number, changes in enumerate(
        [{"processor_class": "PixtralProcessor"}, {"image_processor": {"image_processor_type": "Lfm2VlImageProcessor"}}]
    ):
        folder = make_tiny_llava(tmp_path / str(number))
        file = folder / "processor_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        with pytest.raises(UserError, match="needs torchvision, which is not installed; install the one that belongs"):
            load_processor(folder)
