"""Names the models for lmms-eval, which asks through the entry point group `lmms_eval.models`."""

from typing import Any

_MODELS = "pipeline.lmms_eval.models"


def manifest() -> Any:
    """A `ModelManifest` of lmms-eval: `--model cdp`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="cdp", chat_class_path=f"{_MODELS}.ChatModel", simple_class_path=f"{_MODELS}.SimpleModel"
    )
