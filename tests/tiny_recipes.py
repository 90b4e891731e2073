"""What the tiny random checkpoint of each model family is made of."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """What a tiny checkpoint of a family is made of.

    Attributes:
        config: of the model; `TEXT` stands for the common decoder, `image_token_id` and others for ids.
        processor: class of the library.
        image_processor: class of the library, its Pillow variant.
        image_settings, settings: arguments of the two.
        feature_extractor: class of the library for sounds, for a processor that has one.
        needs_torchvision: whether the library reads its images with torchvision alone, or asks for it.
        image: what the chat template writes for an image.
        image_token: what stands at the positions of image features.
        tokens: further special tokens, those with a name become attributes of the tokenizer.
    """

    config: dict[str, Any]
    processor: str
    image_processor: str
    image_settings: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    feature_extractor: str | None = None
    needs_torchvision: bool = False
    image: str = "<image>"
    image_token: str = "<image>"
    tokens: dict[str, str] = field(default_factory=dict)


SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "vision_use_head": False,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "initializer_range": 0.25,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
PINPOINTS = [[32, 64], [64, 32], [64, 64]]
SQUARE = {"height": 32, "width": 32}
QWEN_IMAGES = {"patch_size": 8, "merge_size": 2, "size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}}
QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN_TOKENS = {
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
TILES = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}


def _qwen(version: str, processor: str, vision: dict[str, Any]) -> Recipe:
    return Recipe(
        config={
            "text_config": {**TEXT, "model_type": f"{version}_text", "rope_parameters": MROPE},
            "vision_config": {**QWEN_VISION, **vision},
        },
        processor=processor,
        image_processor="Qwen2VLImageProcessorPil",
        image_settings=QWEN_IMAGES,
        image="<|vision_start|><|image_pad|><|vision_end|>",
        image_token="<|image_pad|>",
        tokens=QWEN_TOKENS,
    )


def _tiles(model_type: str, name: str) -> Recipe:
    return Recipe(
        config={
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {
                **SIGLIP,
                "model_type": f"{model_type}_vision" if model_type == "idefics3" else "smolvlm_vision",
            },
            "scale_factor": 2,
        },
        processor=f"{name}Processor",
        image_processor=f"{name}ImageProcessorPil",
        image_settings=TILES,
        settings={"image_seq_len": 4},
        tokens={
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
    )


OLDER: dict[str, Recipe] = {
    "llava_next": Recipe(
        config={
            "text_config": {**TEXT, "model_type": "mistral", "sliding_window": None},
            "vision_config": SIGLIP,
            "vision_feature_select_strategy": "full",
            "image_grid_pinpoints": PINPOINTS,
        },
        processor="LlavaNextProcessor",
        image_processor="LlavaNextImageProcessorPil",
        image_settings={"size": SQUARE, "crop_size": SQUARE, "image_grid_pinpoints": PINPOINTS},
        settings={"patch_size": 8, "vision_feature_select_strategy": "full"},
    ),
    "llava_onevision": Recipe(
        config={
            "text_config": {**TEXT, "model_type": "qwen2"},
            "vision_config": SIGLIP,
            "vision_feature_select_strategy": "full",
            "image_grid_pinpoints": PINPOINTS,
        },
        processor="LlavaOnevisionProcessor",
        image_processor="LlavaOnevisionImageProcessorPil",
        image_settings={"size": SQUARE, "image_grid_pinpoints": PINPOINTS},
        settings={"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
        tokens={"video_token": "<video>"},
    ),
    "qwen2_vl": _qwen("qwen2_vl", "Qwen2VLProcessor", {"embed_dim": 16, "hidden_size": 32}),
    "qwen2_5_vl": _qwen(
        "qwen2_5_vl",
        "Qwen2_5_VLProcessor",
        {
            "hidden_size": 16,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "window_size": 32,
            "fullatt_block_indexes": [1],
        },
    ),
    "qwen3_vl": _qwen(
        "qwen3_vl",
        "Qwen3VLProcessor",
        {
            "hidden_size": 16,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
    ),
    "idefics3": _tiles("idefics3", "Idefics3"),
    "smolvlm": _tiles("smolvlm", "SmolVLM"),
    "internvl": Recipe(
        config={
            "text_config": {**TEXT, "model_type": "qwen2"},
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": [32, 32],
                "patch_size": [8, 8],
            },
            "image_seq_length": 4,
        },
        processor="InternVLProcessor",
        image_processor="GotOcr2ImageProcessorPil",
        image_settings={"size": SQUARE, "max_patches": 4},
        settings={"image_seq_length": 4},
        image="<IMG_CONTEXT>",
        image_token="<IMG_CONTEXT>",
        tokens={
            "context_image_token": "<IMG_CONTEXT>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "video_token": "<video>",
        },
    ),
    "gemma3": Recipe(
        config={
            # Sliding layers and whole ones; the window is shorter than a conversation and longer than an image.
            "text_config": {
                **TEXT,
                "model_type": "gemma3_text",
                "query_pre_attn_scalar": 8,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            "vision_config": SIGLIP,
            "mm_tokens_per_image": 4,
        },
        processor="Gemma3Processor",
        image_processor="Gemma3ImageProcessorPil",
        image_settings={"size": SQUARE},
        settings={"image_seq_length": 4},
        image="<start_of_image>",
        image_token="<image_soft_token>",
        tokens={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
    ),
}
