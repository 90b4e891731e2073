"""The released layout: its config, its tensor names, and what both are called in a Hugging Face folder."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from transformers import AutoConfig, LlavaConfig, PreTrainedConfig

from stages.checkpoints.configs import read_config
from stages.student.model.modeling_compodistill import CompoDistillStudentConfig
from storage.errors import UserError

MODEL_TYPES: Final = ("compodistill", "tinyllava")
PLACEHOLDER_ID: Final = -200  # never in an embedding: the released code cuts the token ids apart there

_STRATEGIES: Final = {"patch": "default", "cls_patch": "full"}
_CLASS_TOKENS: Final = {"siglip_vision_model": 0, "clip_vision_model": 1}
"""Tokens that a vision tower puts before its patches. The released code drops the first token of either."""

_PREFIXES: Final = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower._vision_tower.vision_model.": "model.vision_tower.",  # as older libraries named it
    "vision_tower._vision_tower.": "model.vision_tower.",
    "connector._connector.0.": "model.multi_modal_projector.linear_1.",
    "connector._connector.2.": "model.multi_modal_projector.linear_2.",
    "connector.post_connector.": "model.post_connector.",
}
# Constants that older libraries saved with the weights and that models now make themselves.
_CONSTANTS: Final = re.compile(r"\.(position_ids|rotary_emb\.inv_freq)$")


def read_released_config(folder: Path) -> dict[str, Any]:
    """A released `config.json`.

    Raises:
        UserError: If it has another layout, or a part that a Hugging Face Llava cannot express.
    """
    config = read_config(folder / "config.json")
    found = config.get("model_type")
    if found not in MODEL_TYPES:
        raise UserError(
            f"{folder} has model type {found!r}; the layouts known to convert are {', '.join(MODEL_TYPES)}. "
            "A checkpoint in Hugging Face layout needs no conversion"
        )
    expected: dict[str, tuple[Any, ...]] = {
        "connector_type": ("mlp2x_gelu",),
        "image_token_index": (PLACEHOLDER_ID,),
        "vision_feature_select_strategy": tuple(_STRATEGIES),
        # Absent in CompoDistill's configs, whose code resizes to the square.
        "image_aspect_ratio": (None, "square"),
        "vision_model_name_or_path2": (None, ""),
    }
    for name, values in expected.items():
        if config.get(name) not in values:
            raise UserError(
                f"{folder / 'config.json'} has {name} {config.get(name)!r}, a Hugging Face Llava can express "
                f"{' or '.join(repr(value) for value in values if value is not None)}"
            )
    for name, models in {"text_config": None, "vision_config": _CLASS_TOKENS}.items():
        part = config.get(name)
        if not isinstance(part, dict) or "model_type" not in part:
            raise UserError(f"{folder / 'config.json'} has no {name} with a model_type")
        if models is not None and part["model_type"] not in models:
            raise UserError(
                f"{folder / 'config.json'}: {name} is of type {part['model_type']!r}, expected {' or '.join(models)}"
            )
    if config.get("post_connector_use") and not config.get("connector_hidden_size"):
        raise UserError(f"{folder / 'config.json'} uses a post-connector but has no connector_hidden_size")
    return config


def class_tokens(config: Mapping[str, Any]) -> int:
    """Tokens that the vision tower puts before its patches."""
    return _CLASS_TOKENS[config["vision_config"]["model_type"]]


def converted_config(config: Mapping[str, Any], image_token_id: int, vocab_size: int, dtype: str) -> PreTrainedConfig:
    """The Hugging Face config of a released one; a student's is this project's own model type."""
    text = AutoConfig.for_model(**{**config["text_config"], "vocab_size": vocab_size})
    vision = AutoConfig.for_model(**config["vision_config"])
    num_patches = (vision.image_size // vision.patch_size) ** 2
    strategy = _STRATEGIES[config["vision_feature_select_strategy"]]
    shared = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": image_token_id,
        "image_seq_length": num_patches + class_tokens(config) - (strategy == "default"),
        "projector_hidden_act": "gelu",
        "vision_feature_select_strategy": strategy,
        "vision_feature_layer": config["vision_feature_layer"],
        "tie_word_embeddings": text.tie_word_embeddings,
        "dtype": dtype,
    }
    if config.get("post_connector_use"):
        return CompoDistillStudentConfig(adapter_hidden_size=config["connector_hidden_size"], **shared)
    return LlavaConfig(**shared)


def converted_name(name: str) -> str | None:
    """What a released tensor is called in the Hugging Face layout; None for a constant that is not kept.

    Raises:
        UserError: If the layout has no such name.
    """
    if _CONSTANTS.search(name):
        return None
    for old, new in _PREFIXES.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise UserError(
        f"tensor {name!r} is not of the released layout; expected names that begin with {', '.join(_PREFIXES)}"
    )
