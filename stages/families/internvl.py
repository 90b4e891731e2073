"""InternVL in the layout of transformers: tiles of one size in a row, a fixed number of tokens a tile."""

from stages.families.family import Family

FAMILY = Family(
    model_types=("internvl",),
    vision_prefixes=("model.vision_tower.", "model.multi_modal_projector."),
    projector_prefixes=("model.multi_modal_projector.",),
    causal_image_tokens=True,
    pixel_inputs={"pixel_values": "cat"},
    pixels_without_text=False,
    last_linear="multi_modal_projector.linear_2",
)
