"""Gemma 3: the tokens of one image attend to each other in both directions, within the window of sliding layers."""

from stages.families.family import Family

FAMILY = Family(
    model_types=("gemma3",),
    vision_prefixes=("model.vision_tower.", "model.multi_modal_projector."),
    projector_prefixes=("model.multi_modal_projector.",),
    causal_image_tokens=False,
    pixel_inputs={"pixel_values": "cat"},
    # Without these the model masks image tokens as text, without an error.
    modality_input="token_type_ids",
)
