"""How the teacher's share of rotary frequencies is carried over to a decoder, and which decoders can have it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    CohereConfig,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3_5TextConfig,
)

from stages.families.registry import FAMILIES
from stages.student.model.positions_3d import RotaryEmbedding3D, axes_of_frequencies
from stages.student.model.rotary_section import position_settings, scaled_section
from storage.errors import UserError
from tests.stages.student.model.rotary_textbook import rotary_by_hand

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 16,
    "head_dim": 32,
}


def teacher(model_type: str = "qwen2_5_vl", section: tuple[int, ...] | None = (16, 24, 24)) -> PreTrainedConfig:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
    rope |= {} if section is None else {"mrope_section": list(section)}
    return AutoConfig.for_model(model_type, text_config={"rope_parameters": rope})


def settings(decoder: PreTrainedConfig, **of_teacher: Any) -> dict[str, Any]:
    config = teacher(**of_teacher)
    return position_settings(config, decoder, FAMILIES[config.model_type], "the decoder")


@pytest.mark.parametrize(
    ("section", "num_frequencies", "expected"),
    [
        ([16, 24, 24], 64, [16, 24, 24]),
        ([16, 24, 24], 32, [8, 12, 12]),
        ([24, 20, 20], 32, [12, 10, 10]),
        ([16, 24, 24], 40, [10, 15, 15]),
        ([16, 24, 24], 50, [12, 19, 19]),
        ([24, 20, 20], 48, [18, 15, 15]),
        ([11, 11, 10], 64, [22, 22, 20]),
        ([11, 11, 10], 16, [6, 5, 5]),
        ([24, 20, 20], 17, [7, 5, 5]),
    ],
)
def test_shares_keep_their_proportions_and_what_is_left_goes_to_the_largest_remainders(
    section: list[int], num_frequencies: int, expected: list[int]
) -> None:
    assert scaled_section(section, num_frequencies) == expected
    assert sum(expected) == num_frequencies


@pytest.mark.parametrize(
    ("model_type", "section"),
    [
        ("qwen2_vl", [16, 24, 24]),
        ("qwen2_5_vl", [16, 24, 24]),
        ("qwen3_vl", [24, 20, 20]),
        ("qwen3_5", [11, 11, 10]),
        ("glm4v", [8, 12, 12]),
    ],
)
def test_frequencies_take_the_axis_that_they_take_in_the_teacher(model_type: str, section: list[int]) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": section}
    text = AutoConfig.for_model(model_type, text_config={**SMALL, "rope_parameters": rope}).get_text_config()
    with torch.device("meta"):
        rotary = AutoModel.from_config(text).rotary_emb
    # Numbers of axes in place of frequencies; GLM lays each twice in a row, the others all of them twice.
    numbers = torch.arange(3.0)[:, None, None, None].expand(3, 1, 1, sum(section)).clone()
    found = rotary.recomposition_frequencies(numbers)[0, 0]
    found = found[::2] if model_type == "glm4v" else found[: sum(section)]
    interleaved = FAMILIES[model_type].rotary_axes == "interleaved"
    assert axes_of_frequencies(section, interleaved=interleaved) == found.int().tolist()


SCALED = {
    "plain": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_decoders_own_scaling_of_frequencies_is_kept(kind: str, interleaved: bool) -> None:
    decoder = LlamaConfig(**SMALL, rope_parameters={"rope_theta": 1e4, **SCALED[kind]}, max_position_embeddings=256)
    section = settings(decoder)["mrope_section"]
    assert section == [4, 6, 6]
    rotary = AutoModel.from_config(decoder).rotary_emb
    positions_3T = torch.tensor([[0, 1, 2, 2, 2, 9], [0, 1, 2, 3, 4, 9], [0, 1, 5, 6, 7, 9]])
    axes = axes_of_frequencies(section, interleaved=interleaved)
    found = RotaryEmbedding3D.of(rotary, torch.zeros(1), positions_3T[:, None], axes).cos_sin
    plain = rotary_by_hand(positions_3T, section, interleaved=interleaved)
    angles_TF = positions_3T.double()[axes].T * rotary.inv_freq.double()
    for part, function, unscaled in zip(found, (torch.cos, torch.sin), plain, strict=True):
        expected = function(torch.cat([angles_TF, angles_TF], 1)) * rotary.attention_scaling
        torch.testing.assert_close(part[0].double(), expected, atol=1e-6, rtol=0)
        assert torch.allclose(expected, unscaled, atol=1e-6) == (kind == "plain")


def test_a_decoder_with_a_part_of_its_channels_turned_gets_that_part_shared() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    linear = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    linear["layer_types"] = ["linear_attention", "full_attention"]
    decoder = Qwen3_5TextConfig(**SMALL, **linear, linear_value_head_dim=8, rope_parameters=rope)
    found = settings(decoder, model_type="qwen3_5", section=(11, 11, 10))
    assert found == {"mrope_section": [3, 3, 2], "mrope_interleaved": True}


def test_teachers_with_ordinary_positions_say_nothing() -> None:
    llava = AutoConfig.for_model("llava_onevision")
    assert position_settings(llava, Qwen2Config(**SMALL), FAMILIES["llava_onevision"], "the decoder") == {}


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "by length": (LlamaConfig(**SMALL, rope_parameters=DYNAMIC), r"depend on the length \(dynamic\)"),
    "several": (Gemma3TextConfig(**SMALL), "do not all take one rotary embedding of positions"),
    "pairs": (CohereConfig(**{**SMALL, "hidden_size": 64}), "not laid out in two halves"),
    "too few": (Qwen2Config(**{**SMALL, "head_dim": 4, "hidden_size": 8}), "has 2 rotary frequencies, too few"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_decoder_that_cannot_have_them_is_refused_with_the_way_out(kind: str) -> None:
    decoder, reason = REFUSED[kind]
    with pytest.raises(UserError, match=rf"the decoder .*{reason}.*; .*set train\.positions to ordinary"):
        settings(decoder)


def test_a_teacher_that_does_not_say_its_shares_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"qwen2_5_vl\) has no mrope_section, .* set train\.positions to ordinary"):
        settings(Qwen2Config(**SMALL), section=None)
