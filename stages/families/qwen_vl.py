"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: patches of all images in one row, N follows the image's size, 3D positions."""

from dataclasses import replace

from stages.families.family import Family

FAMILY = Family(
    model_types=("qwen2_vl", "qwen2_5_vl"),
    vision_prefixes=("model.visual.",),
    projector_prefixes=("model.visual.merger.",),
    causal_image_tokens=True,
    pixel_inputs={"pixel_values": "cat", "image_grid_thw": "cat"},
    # The model works out its 3D positions from these and the grid.
    modality_input="mm_token_type_ids",
    last_linear="visual.merger.mlp.2",
)

# Qwen3-VL also adds features of earlier vision layers inside its first decoder layers ("deepstack").
QWEN3 = replace(
    FAMILY,
    model_types=("qwen3_vl",),
    projector_prefixes=("model.visual.merger.", "model.visual.deepstack_merger_list."),
    features_enter_once=False,
    last_linear=None,
)
