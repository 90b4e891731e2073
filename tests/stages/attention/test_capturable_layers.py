"""Which decoder layers give attention maps is known from the config, and is what a real forward pass gives."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from stages.attention.capturable_layers import check_maps, layers_with_maps
from stages.attention.capture import CAPTURING_SDPA, AttentionCapture
from stages.teacher.config import TeacherConfig
from stages.teacher.identity import identify_teacher
from storage.errors import UserError
from tests.checkpoints import make_tiny_llava
from tests.tiny_families import RECIPES, softmax_layers

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None}
FEW_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
THIRD_IS_FULL = {"layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"]}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
ALL = {0, 1, 2, 3}

DECODERS: dict[str, tuple[dict[str, Any], set[int]]] = {
    "llama": ({}, ALL),
    "qwen2": ({}, ALL),
    "gemma3_text": ({}, ALL),
    "mixtral": (FEW_EXPERTS, ALL),
    "qwen3_moe": (FEW_EXPERTS, ALL),
    "stablelm": ({}, set()),
    "nemotron": ({}, set()),
    "qwen3_next": ({**FEW_EXPERTS, **LINEAR, **THIRD_IS_FULL}, {2}),
    "qwen3_5_text": ({**LINEAR, **THIRD_IS_FULL}, {2}),
    "minimax": ({**FEW_EXPERTS, **THIRD_IS_FULL}, {2}),
}


def config_of(model_type: str) -> PreTrainedConfig:
    return AutoConfig.for_model(model_type, **{**SIZES, **HEADS, **DECODERS[model_type][0]})


@pytest.mark.parametrize("model_type", DECODERS)
def test_the_layers_known_from_the_config_are_those_that_a_real_forward_pass_captures(model_type: str) -> None:
    config, expected = config_of(model_type), DECODERS[model_type][1]
    assert layers_with_maps(config) == expected
    model = AutoModel.from_config(config)
    model.set_attn_implementation(CAPTURING_SDPA)
    capture = AttentionCapture(frozenset(ALL), [torch.arange(1, 4)])
    model(input_ids=torch.arange(6)[None], capture=capture, use_cache=False)
    assert set(capture.maps) == expected


@pytest.mark.parametrize("model_type", RECIPES)
def test_all_layers_with_softmax_attention_of_each_teacher_family_give_maps(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, **RECIPES[model_type].config).get_text_config()
    assert layers_with_maps(config) == softmax_layers(model_type)


def test_it_draws_no_random_numbers_and_leaves_the_config_as_it_was() -> None:
    config = config_of("llama")
    before, state = config.to_dict(), torch.get_rng_state()
    layers_with_maps(config)
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_without_maps_are_named_with_those_that_have_some() -> None:
    with pytest.raises(UserError) as caught:
        check_maps("the decoder", config_of("qwen3_next"), (1, 2, 3), "choose others")
    found = str(caught.value)
    assert found.startswith("layers [1, 3] of the decoder give no attention map (only its layers [2] do)")
    assert found.endswith("choose others")
    check_maps("the decoder", config_of("qwen3_next"), (2,), "choose others")


def test_a_family_that_cannot_run_with_sdpa_is_refused() -> None:
    with pytest.raises(UserError, match="has no sdpa attention"):
        layers_with_maps(AutoConfig.for_model("gpt_oss", **SIZES, **HEADS))


def test_a_teacher_whose_decoder_gives_no_maps_is_refused_before_anything_runs(tmp_path: Path) -> None:
    folder = make_tiny_llava(tmp_path / "teacher")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "model_type": "stablelm"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="none of its layers does") as caught:
        identify_teacher(TeacherConfig(checkpoint=str(folder)), on_gpu=False, with_weights=False)
    assert "set teacher.layers to others" in str(caught.value)
