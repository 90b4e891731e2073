"""What the tiny random checkpoints of the newer model families are made of."""

from typing import Any

from tests.tiny_recipes import MROPE, QWEN_IMAGES, QWEN_TOKENS, QWEN_VISION, TEXT, Recipe

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
HYBRID = {
    # The outer layers have no maps.
    "layer_types": ["linear_attention", "full_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0},
}
VISION = {**QWEN_VISION, "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32}


def _qwen3(version: str, text: dict[str, Any], vision: dict[str, Any]) -> Recipe:
    return Recipe(
        config={
            "text_config": {**TEXT, "model_type": f"{version}_text", "rope_parameters": MROPE, **text},
            "vision_config": {**VISION, "num_position_embeddings": 64, **vision},
        },
        processor="Qwen3VLProcessor",
        image_processor="Qwen2VLImageProcessorPil",
        image_settings=QWEN_IMAGES,
        image="<|vision_start|><|image_pad|><|vision_end|>",
        image_token="<|image_pad|>",
        tokens=QWEN_TOKENS,
    )


def _glm(version: str, text: dict[str, Any]) -> Recipe:
    return Recipe(
        config={
            "text_config": {**TEXT, "model_type": f"{version}_text", "rope_parameters": MROPE, **text},
            "vision_config": {**VISION, "image_size": 32},
        },
        processor="Glm4vProcessor",
        image_processor="Glm4vImageProcessorPil",
        # Its sizes count the two frames that one picture becomes.
        image_settings={**QWEN_IMAGES, "size": {"shortest_edge": 2 * 32 * 32, "longest_edge": 2 * 64 * 64}},
        image="<|begin_of_image|><|image|><|end_of_image|>",
        image_token="<|image|>",
        tokens={
            "video_token": "<|video|>",
            "image_start_token": "<|begin_of_image|>",
            "image_end_token": "<|end_of_image|>",
            "video_start_token": "<|begin_of_video|>",
            "video_end_token": "<|end_of_video|>",
        },
    )


PIXTRAL_VISION = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 8,
    "image_size": 64,
    "patch_size": 8,
}


def _pixtral(merge: int, config: dict[str, Any]) -> Recipe:
    return Recipe(
        config={
            "text_config": {**TEXT, "model_type": "mistral", "sliding_window": None},
            "vision_config": PIXTRAL_VISION,
            **config,
        },
        processor="PixtralProcessor",
        image_processor="PixtralImageProcessor",
        image_settings={"size": {"longest_edge": 32 * merge}, "patch_size": {"height": 8 * merge, "width": 8 * merge}},
        settings={"patch_size": 8, "spatial_merge_size": merge},
        needs_torchvision=True,
        image="[IMG]",
        image_token="[IMG]",
        tokens={"image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
    )


PIXTRAL = _pixtral(1, {"vision_feature_select_strategy": "full", "vision_feature_layer": -1})
"""A LLaVA whose vision tower takes images of any size."""

NEWER: dict[str, Recipe] = {
    "qwen3_vl_moe": _qwen3("qwen3_vl_moe", EXPERTS, {"deepstack_visual_indexes": [1, 0]}),
    "qwen3_5": _qwen3("qwen3_5", HYBRID, {}),
    "qwen3_5_moe": _qwen3("qwen3_5_moe", {**HYBRID, **EXPERTS, "shared_expert_intermediate_size": 16}, {}),
    "glm4v": _glm("glm4v", {}),
    "glm4v_moe": _glm(
        "glm4v_moe",
        {
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0},
        },
    ),
    "gemma4": Recipe(
        # Of what the published models have each something: layers with keys and values of earlier ones, embeddings for
        # each layer, experts, wider heads in layers that see all.
        config={
            "text_config": {
                **TEXT,
                "model_type": "gemma4_text",
                "use_bidirectional_attention": "vision",
                "sliding_window": 24,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "num_kv_shared_layers": 2,
                "vocab_size_per_layer_input": 400,
                "hidden_size_per_layer_input": 8,
                "global_head_dim": 16,
                "num_global_key_value_heads": 1,
                "attention_k_eq_v": True,
                "enable_moe_block": True,
                "num_experts": 4,
                "top_k_experts": 2,
                "moe_intermediate_size": 16,
                "final_logit_softcapping": 5.0,
            },
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "patch_size": 4,
                "pooling_kernel_size": 2,
                "position_embedding_size": 64,
            },
            "audio_config": None,
        },
        processor="Gemma4Processor",
        image_processor="Gemma4ImageProcessorPil",
        image_settings={"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70},
        feature_extractor="Gemma4AudioFeatureExtractor",
        image="<|image|>",
        image_token="<|image|>",
        tokens={
            "boi_token": "<|image>",
            "eoi_token": "<image|>",
            "audio_token": "<|audio|>",
            "boa_token": "<|audio>",
            "eoa_token": "<audio|>",
            "video_token": "<|video|>",
        },
    ),
    "ovis2": Recipe(
        config={
            "text_config": {**TEXT, "model_type": "qwen2"},
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 8,
                "hidden_stride": 2,
                "vocab_size": 24,
                "num_visual_indicator_tokens": 5,
            },
            "hidden_size": 32,
        },
        processor="Ovis2Processor",
        image_processor="Ovis2ImageProcessorPil",
        image_settings={"size": {"height": 32, "width": 32}, "crop_to_patches": True, "max_patches": 4},
        settings={"image_seq_length": 4},
        image_token="<IMG_ATOM>",
        tokens={
            "placeholder": "<image>",
            **{f"visual_indicator_{name.lower()}": f"<IMG_{name}>" for name in ("START", "GRID", "COL", "ROW", "END")},
        },
    ),
    "mistral3": _pixtral(2, {"spatial_merge_size": 2}),
    "lfm2_vl": Recipe(
        config={
            "text_config": {
                **{name: value for name, value in TEXT.items() if name != "head_dim"},
                "model_type": "lfm2",
                # The outer layers have no maps.
                "layer_types": ["conv", "full_attention", "full_attention", "conv"],
                "block_auto_adjust_ff_dim": False,
            },
            "vision_config": {
                "model_type": "siglip2_vision_model",
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_patches": 16,
                "patch_size": 8,
                "vision_use_head": False,
            },
            "projector_hidden_size": 24,
        },
        processor="Lfm2VlProcessor",
        image_processor="Lfm2VlImageProcessor",
        image_settings={
            "encoder_patch_size": 8,
            "tile_size": 32,
            "max_tiles": 4,
            "min_image_tokens": 2,
            "max_image_tokens": 4,
        },
        needs_torchvision=True,
        tokens={
            "image_start_token": "<|image_start|>",
            "image_end_token": "<|image_end|>",
            "image_thumbnail_token": "<|img_thumbnail|>",
        },
    ),
}
"""Families since 2025, beside those of `tests.tiny_recipes`."""
