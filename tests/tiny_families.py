"""Builds a tiny random checkpoint of each model family on disk, offline: model, tokenizer, processor, chat template.

The processors are the library's own, with their Pillow image backends; those that also read videos are built without
that half (`stages.checkpoints.processors.load_processor`). Equal arguments give equal weights.
"""

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from stages.checkpoints.processors import images_only

TEMPLATE = """\
{%- for message in messages -%}
{{- message['role'] + ': ' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'][0]['text'] + eos_token -}}{%- endgeneration -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- 'IMAGE' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'assistant: ' -}}{%- endif -%}
"""

_TEXT = (
    "user: What is the color of the square?\nassistant: The square is red.",
    "user: Describe the image.\nassistant: A blue circle is left of a green triangle.",
)


@dataclass(frozen=True)
class _Recipe:
    """What a tiny checkpoint of a family is made of.

    Attributes:
        config: of the model; `TEXT` stands for the common decoder, `image_token_id` and others for ids.
        processor: class of the library.
        image_processor: class of the library, its Pillow variant.
        image_settings, settings: arguments of the two.
        image: what the chat template writes for an image.
        image_token: what stands at the positions of image features.
        tokens: further special tokens, those with a name become attributes of the tokenizer.
    """

    config: dict[str, Any]
    processor: str
    image_processor: str
    image_settings: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
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


def _qwen(version: str, processor: str, vision: dict[str, Any]) -> _Recipe:
    return _Recipe(
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


def _tiles(model_type: str, name: str) -> _Recipe:
    return _Recipe(
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


RECIPES: dict[str, _Recipe] = {
    "llava_next": _Recipe(
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
    "llava_onevision": _Recipe(
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
    "internvl": _Recipe(
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
    "gemma3": _Recipe(
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


def make_tiny_family(folder: Path, model_type: str, *, seed: int = 0) -> Path:
    """A checkpoint of `model_type` with 4 decoder layers of width 32."""
    recipe = RECIPES[model_type]
    tokenizer = _train_tokenizer(recipe)
    image_token_id = tokenizer.convert_tokens_to_ids(recipe.image_token)
    ids = {"image_token_id": image_token_id, "image_token_index": image_token_id}
    named = {
        "video_token": "video_token",
        "vision_start_token": "vision_start_token",
        "vision_end_token": "vision_end_token",
    }
    ids |= {
        f"{name}_id": tokenizer.convert_tokens_to_ids(recipe.tokens[name]) for name in named if name in recipe.tokens
    }
    text = {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = AutoConfig.for_model(
        model_type,
        **{**recipe.config, "text_config": {**recipe.config["text_config"], **text}},
        **ids,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
        # The library leaves some at zero or one; random ones are not blind to mistakes.
        for name, parameter in model.named_parameters():
            if "newline" in name or "input_projection" in name:
                torch.nn.init.normal_(parameter, std=0.25)
    model.save_pretrained(folder)
    cls = getattr(transformers, recipe.processor)
    cls = images_only(cls) if "video_processor" in cls.get_attributes() else cls
    images = getattr(transformers, recipe.image_processor)(**recipe.image_settings)
    video = {"video_processor": None} if "video_processor" in inspect.signature(cls.__init__).parameters else {}
    template = TEMPLATE.replace("IMAGE", recipe.image)
    cls(images, tokenizer, **video, chat_template=template, **recipe.settings).save_pretrained(folder)
    return folder


def _train_tokenizer(recipe: _Recipe) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|pad|>", recipe.image_token, *recipe.tokens.values()]
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=list(dict.fromkeys(special)),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        extra_special_tokens={"image_token": recipe.image_token, **recipe.tokens},
    )
