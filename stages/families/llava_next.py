"""LLaVA-NeXT (1.6): the image in tiles beside a small whole, a learnt token at each row's end; N differs by image."""

from stages.families.family import Family

FAMILY = Family(
    model_types=("llava_next",),
    vision_prefixes=("model.vision_tower.", "model.multi_modal_projector.", "model.image_newline"),
    projector_prefixes=("model.multi_modal_projector.", "model.image_newline"),
    causal_image_tokens=True,
    # [images, tiles, channels, height, width]: the model takes as many tiles as the image's size says.
    pixel_inputs={"pixel_values": "pad", "image_sizes": "cat"},
    last_linear="multi_modal_projector.linear_2",
    added_vectors=("image_newline",),
)
