"""LLaVA-OneVision: tiles as in LLaVA-NeXT for a sample's only image, several images of a sample without tiles."""

from stages.families.family import Family

FAMILY = Family(
    model_types=("llava_onevision",),
    vision_prefixes=("model.vision_tower.", "model.multi_modal_projector.", "model.image_newline"),
    projector_prefixes=("model.multi_modal_projector.", "model.image_newline"),
    causal_image_tokens=True,
    # batch_num_images says which images stand alone; without it the model would look for tiles in all of them.
    pixel_inputs={"pixel_values": "pad", "image_sizes": "cat", "batch_num_images": "cat"},
    last_linear="multi_modal_projector.linear_2",
    added_vectors=("image_newline",),
)
