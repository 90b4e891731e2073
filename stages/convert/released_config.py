"""The config of a released checkpoint: whether a Hugging Face Llava can express it, known without a library."""

from pathlib import Path
from typing import Any, Final

from stages.checkpoints.config_files import CONFIG, read_config
from storage.errors import UserError

MODEL_TYPES: Final = ("compodistill", "tinyllava")
PLACEHOLDER_ID: Final = -200  # never in an embedding: the released code cuts the token ids apart there
STRATEGIES: Final = {"patch": "default", "cls_patch": "full"}
CLASS_TOKENS: Final = {"siglip_vision_model": 0, "clip_vision_model": 1}
"""Tokens that a vision tower puts before its patches. The released code drops the first token of either."""


def read_released_config(folder: Path) -> dict[str, Any]:
    """A released `config.json`.

    Raises:
        UserError: If it has another layout, or a part that a Hugging Face Llava cannot express.
    """
    config = read_config(folder / CONFIG)
    found = config.get("model_type")
    if found not in MODEL_TYPES:
        raise UserError(
            f"{folder} has model type {found!r}; the layouts known to convert are {', '.join(MODEL_TYPES)}. "
            "A checkpoint in Hugging Face layout needs no conversion"
        )
    expected: dict[str, tuple[Any, ...]] = {
        "connector_type": ("mlp2x_gelu",),
        "image_token_index": (PLACEHOLDER_ID,),
        "vision_feature_select_strategy": tuple(STRATEGIES),
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
    for name, models in {"text_config": None, "vision_config": CLASS_TOKENS}.items():
        part = config.get(name)
        if not isinstance(part, dict) or "model_type" not in part:
            raise UserError(f"{folder / 'config.json'} has no {name} with a model_type")
        if models is not None and part["model_type"] not in tuple(models):
            raise UserError(
                f"{folder / 'config.json'}: {name} is of type {part['model_type']!r}, expected {' or '.join(models)}"
            )
    if config.get("post_connector_use") and not config.get("connector_hidden_size"):
        raise UserError(f"{folder / 'config.json'} uses a post-connector but has no connector_hidden_size")
    return config
