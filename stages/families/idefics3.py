"""Idefics3 and SmolVLM: tiles of one size, each between text tokens that name its row and column."""

from stages.families.family import Family

FAMILY = Family(
    model_types=("idefics3", "smolvlm"),
    vision_prefixes=("model.vision_model.", "model.connector."),
    projector_prefixes=("model.connector.",),
    causal_image_tokens=True,
    # [samples, tiles of all images, ...]: the model leaves out tiles that are zero throughout.
    pixel_inputs={"pixel_values": "pad", "pixel_attention_mask": "pad"},
    last_linear="connector.modality_projection.proj",
)
