"""Builds a tiny random checkpoint of each model family on disk, offline: model, tokenizer, processor, chat template.

The processors are the library's own, with their Pillow image backends; those that also read videos are built without
that half (`stages.checkpoints.processors.load_processor`). Equal arguments give equal weights.
"""

import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.utils import is_torchvision_available

from stages.checkpoints.processors import images_only
from tests.tiny_newer_recipes import NEWER
from tests.tiny_recipes import OLDER, Recipe

ALL_RECIPES = {**OLDER, **NEWER}
RECIPES = {
    name: recipe for name, recipe in ALL_RECIPES.items() if is_torchvision_available() or not recipe.needs_torchvision
}
"""Recipes of the families that can be run here, by `model_type`."""

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


def softmax_layers(model_type: str) -> set[int]:
    """The decoder layers that have attention maps; the others have linear attention or convolutions."""
    types = RECIPES[model_type].config["text_config"].get("layer_types", ["full_attention"] * 4)
    return {number for number, kind in enumerate(types) if kind in ("full_attention", "sliding_attention")}


HYBRID = sorted(name for name in RECIPES if len(softmax_layers(name)) < 4)


def make_tiny_family(
    folder: Path, model_type: str, *, seed: int = 0, recipe: Recipe | None = None, **decoder: Any
) -> Path:
    """A checkpoint of `model_type` with 4 decoder layers of width 32; `decoder` are other settings of the decoder."""
    recipe = recipe or RECIPES[model_type]
    tokenizer = _train_tokenizer(recipe)
    image_token_id = tokenizer.convert_tokens_to_ids(recipe.image_token)
    ids = {"image_token_id": image_token_id, "image_token_index": image_token_id}
    ids |= {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in recipe.tokens.items()}
    ids["visual_indicator_token_ids"] = [id_ for name, id_ in ids.items() if name.startswith("visual_indicator")]
    text = {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if "vocab_size_per_layer_input" in recipe.config["text_config"]:
        text["vocab_size_per_layer_input"] = len(tokenizer)
    config = AutoConfig.for_model(
        model_type,
        **{**recipe.config, "text_config": {**recipe.config["text_config"], **text, **decoder}},
        **ids,
        vocab_size=len(tokenizer),
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
    sounds = recipe.feature_extractor and {"feature_extractor": getattr(transformers, recipe.feature_extractor)()}
    template = TEMPLATE.replace("IMAGE", recipe.image)
    parts = {"image_processor": images, "tokenizer": tokenizer, **video, **(sounds or {})}
    cls(**parts, chat_template=template, **recipe.settings).save_pretrained(folder)
    return folder


def _train_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
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
