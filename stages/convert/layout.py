"""The released layout: its config, its tensor names, and what both are called in a Hugging Face folder."""

import re
from collections.abc import Mapping
from typing import Any, Final

from transformers import AutoConfig, LlavaConfig, PreTrainedConfig

from stages.convert.released_config import CLASS_TOKENS, STRATEGIES
from stages.student.model.modeling_compodistill import CompoDistillStudentConfig
from storage.errors import UserError

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


def class_tokens(config: Mapping[str, Any]) -> int:
    """Tokens that the vision tower puts before its patches."""
    return CLASS_TOKENS[config["vision_config"]["model_type"]]


def converted_config(config: Mapping[str, Any], image_token_id: int, vocab_size: int, dtype: str) -> PreTrainedConfig:
    """The Hugging Face config of a released one; a student's is this project's own model type."""
    text = AutoConfig.for_model(**{**config["text_config"], "vocab_size": vocab_size})
    vision = AutoConfig.for_model(**config["vision_config"])
    num_patches = (vision.image_size // vision.patch_size) ** 2
    strategy = STRATEGIES[config["vision_feature_select_strategy"]]
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
