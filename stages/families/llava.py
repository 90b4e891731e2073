"""LLaVA 1.5 and its kin: any vision tower, `Linear -> GELU -> Linear`, any causal decoder."""

from stages.families.family import Family

FAMILY = Family(
    model_types=("llava",),
    vision_prefixes=("model.vision_tower.", "model.multi_modal_projector."),
    projector_prefixes=("model.multi_modal_projector.",),
    causal_image_tokens=True,
    pixel_inputs={"pixel_values": "cat"},
    last_linear="multi_modal_projector.linear_2",
)
