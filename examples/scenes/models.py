"""The example's networks: a stock Llava as the teacher, a stock Qwen2 as the student's language model."""

from __future__ import annotations

import math

import torch
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
)

from examples.scenes.patches import GRID, PATCH_SIZE
from examples.scenes.processor import EOS, IMAGE, PAD, VOCABULARY
from pipeline.demo.scenes.world import IMAGE_SIZE

_PAD_ID, _EOS_ID, _IMAGE_ID = (VOCABULARY.index(token) for token in (PAD, EOS, IMAGE))


def text_config(hidden_size: int, num_layers: int, num_heads: int) -> Qwen2Config:
    """A small Qwen2 over the scenes' vocabulary; few, wide heads learnt faster than many narrow ones."""
    return Qwen2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=1024,
        initializer_range=0.05,
        tie_word_embeddings=False,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=_EOS_ID,
        pad_token_id=_PAD_ID,
    )


def build_teacher(seed: int) -> LlavaForConditionalGeneration:
    """An untrained teacher: SigLIP tower of 4 layers, linear-GELU-linear adapter, Qwen2 of 8 layers."""
    vision = SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config(hidden_size=128, num_layers=8, num_heads=2),
        image_token_index=_IMAGE_ID,
        image_seq_length=GRID * GRID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
        pad_token_id=_PAD_ID,
        eos_token_id=_EOS_ID,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        _write_grid(model)
    model.generation_config = GenerationConfig(
        eos_token_id=_EOS_ID, pad_token_id=_PAD_ID, max_new_tokens=24, do_sample=False
    )
    return model


@torch.no_grad()
def _write_grid(model: LlavaForConditionalGeneration) -> None:
    """Start the tower's position embeddings from row and column codes, so that no place has to be learnt."""
    table_PD = model.model.vision_tower.embeddings.position_embedding.weight
    place = torch.arange(GRID * GRID)
    codes = place_code(torch.stack([place % GRID, place // GRID], dim=1).add(0.5).div(GRID))
    table_PD.normal_(std=0.02)
    table_PD[:, : codes.shape[1]] = codes


def place_code(at: torch.Tensor) -> torch.Tensor:
    """Each of the last axis's coordinates, 0..1, as a line and three waves: `[..., 2]` to `[..., 14]`."""
    codes = [2 * at - 1]
    codes += [wave(math.pi * n * at) for n in (1, 2, 3) for wave in (torch.sin, torch.cos)]
    return torch.cat(codes, dim=-1)


def build_student_lm(seed: int) -> Qwen2ForCausalLM:
    """An untrained language model for students: half of the teacher's width, 6 layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(text_config(hidden_size=64, num_layers=6, num_heads=2))
    model.generation_config = GenerationConfig(
        eos_token_id=_EOS_ID, pad_token_id=_PAD_ID, max_new_tokens=24, do_sample=False
    )
    return model
